"""Kernels with a clock around adapters and attention, where a call returns when its work is done (on a CPU).

The parts of one step of several are measured. In the others the kernels are called directly, and cost nothing more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from inlaid.kernels.backend import AttentionBackend, Kernels, LoraBackend

_EVERY = 4  # of so many steps one is measured


class _Timed:
    """An object some of whose methods are timed while `timing` is set."""

    def __init__(self, inner: object, methods: Sequence[str]) -> None:
        self._direct = {name: getattr(inner, name) for name in methods}
        self._clocked = {name: self._clock(method) for name, method in self._direct.items()}
        self.seconds = 0.0
        self.timing(False)

    def timing(self, on: bool) -> None:
        """Measure the calls from now on, or no longer."""
        self.__dict__.update(self._clocked if on else self._direct)

    def _clock(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - began

        return measured


class StepSplit:
    """The seconds of all steps, and by part of those that were measured; `kernels` are to be used in their place."""

    def __init__(self, kernels: Kernels) -> None:
        self._attention = _Timed(kernels.attention, ("plan", "attend"))
        self._lora = _Timed(kernels.lora, ("plan", "shrink", "defer", "expand")) if kernels.lora is not None else None
        self.kernels = replace(
            kernels,
            attention=cast(AttentionBackend, self._attention),
            lora=None if self._lora is None else cast(LoraBackend, self._lora),
        )
        self._num_steps = self._num_measured = 0
        self._seconds = self._measured_seconds = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count the step in the body, and measure its parts if its turn has come."""
        self._num_steps += 1
        by_part = self._num_steps % _EVERY == 0
        if by_part:
            self._timing(True)
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self._seconds += seconds
            if by_part:
                self._num_measured += 1
                self._measured_seconds += seconds
                self._timing(False)

    def _timing(self, on: bool) -> None:
        for part in (self._attention, self._lora):
            if part is not None:
                part.timing(on)

    def sums(self) -> dict[str, float]:
        """Return the number and seconds of all steps and of those whose parts were measured, and these by part."""
        return {
            "steps": self._num_steps,
            "seconds": self._seconds,
            "measured": self._num_measured,
            "measured_seconds": self._measured_seconds,
            "adapters": 0.0 if self._lora is None else self._lora.seconds,
            "attention": self._attention.seconds,
        }
