"""Bound on the time of a step that makes tokens of answers: prompts get as many tokens of it as the steps before say
that the device computes in that time. The scheduler reports each step; `Decodes` asks.
"""

from __future__ import annotations

from collections.abc import Sequence

from inlaid.engine.request import Work

_FEWEST = 16  # prompt tokens that a step may always have; steps of fewer say little about the time of one
_FIRST = 128  # prompt tokens until a step has been timed


class StepTime:
    """The seconds that a token takes, and the prompt tokens that follow from them."""

    def __init__(self, most_seconds: float) -> None:
        self._most_seconds = most_seconds  # 0: no bound
        self._per_token = 0.0  # seconds; 0: no step has been timed

    def note(self, works: Sequence[Work], seconds: float) -> None:
        """Learn from a step that is over, if it had prompts."""
        if sum(work.num_tokens for work in works if work.num_tokens > 1 and not work.draft) < _FEWEST:
            return
        now = seconds / sum(work.num_tokens for work in works)
        self._per_token = (self._per_token + now) / 2 if self._per_token else now

    def bound(self, budget: int, num_decodes: int) -> int:
        """Return how much of a budget of prompt tokens a step may use that makes `num_decodes` tokens of answers."""
        if not self._most_seconds or not num_decodes:
            return budget
        in_time = int(self._most_seconds / self._per_token) - num_decodes if self._per_token else _FIRST
        return min(budget, max(in_time, _FEWEST))
