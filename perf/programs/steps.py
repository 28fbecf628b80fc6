"""Times of an engine's steps, each with its phase: prefill if any request computes more than its next token."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from inlaid.engine.engine import Engine
from inlaid.engine.request import Batch


@dataclass(frozen=True)
class Step:
    """One step: from its submission, or from the end of the step before if that was later, to its end."""

    phase: str
    ms: float
    sequences: int
    tokens: int
    adapters: int  # the base, if it takes part, is one of them


class StepTimes:
    """Watches the runner of an engine."""

    def __init__(self, engine: Engine) -> None:
        runner: Any = engine.runner
        self._submit, self._collect = runner.submit, runner.collect
        self._submitted: deque[tuple[Batch, float]] = deque()
        self._ended = 0.0
        self._steps: list[Step] = []
        runner.submit, runner.collect = self._on_submit, self._on_collect

    def take(self) -> list[Step]:
        """Take the steps since the last time."""
        steps, self._steps = self._steps, []
        return steps

    def _on_submit(self, batch: Batch) -> Any:
        self._submitted.append((batch, time.perf_counter()))
        return self._submit(batch)

    def _on_collect(self, ticket: Any) -> Any:
        result = self._collect(ticket)
        now = time.perf_counter()
        batch, begun = self._submitted.popleft()
        phase = "decode" if all(work.is_decode for work in batch.works) else "prefill"
        ms = 1e3 * (now - max(begun, self._ended))
        adapters = len({work.request.adapter for work in batch.works})
        self._steps.append(Step(phase, ms, len(batch.works), batch.num_tokens, adapters))
        self._ended = now
        return result
