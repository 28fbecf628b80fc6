"""Drafts from a trace: how many guesses each decode of an adapter had on a real engine, and how many were right.

The simulator has no text, so its drafter guesses the word that its runner says, and another one where the trace was
wrong; the runner then accepts what the trace accepted, and the scheduler, the ledger and the lengths are the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

from inlaid.engine.request import Request
from inlaid.engine.speculation import Draft

WORD, OTHER = 0, 2  # what the simulated runner says, and what it never says


class Acceptances:
    """Guesses of each decode and how many were right, by adapter, in the order of its decodes."""

    def __init__(self, by_adapter: Mapping[str, Sequence[tuple[int, int]]]) -> None:
        for adapter, steps in by_adapter.items():
            if not steps or any(not 0 <= right <= guesses for guesses, right in steps):
                raise ValueError(f"the trace of {adapter!r} needs decodes, each with no more guesses right than made")
        self.by_adapter = dict(by_adapter)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return the means of each adapter."""
        return {
            adapter: {
                "decodes": len(steps),
                "guesses": round(sum(guesses for guesses, _ in steps) / len(steps), 3),
                "right": round(sum(right for _, right in steps) / len(steps), 3),
            }
            for adapter, steps in self.by_adapter.items()
        }


class TracedDrafter:
    """Drafts as a trace has them; each adapter's decodes come round in turn."""

    def __init__(self, acceptances: Acceptances) -> None:
        self._turns = {adapter: cycle(steps) for adapter, steps in acceptances.by_adapter.items()}

    def draft(self, request: Request, most: int) -> Draft | None:
        turns = self._turns.get(request.adapter_name or "")
        guesses, right = (0, 0) if turns is None else next(turns)
        tokens = ((WORD,) * right + (OTHER,) * (guesses - right))[:most]
        return Draft(tokens, match=4) if tokens else None

    def end(self, request: Request) -> None:
        """Do nothing: there is nothing to learn."""
