"""Kernels with a clock around adapters and attention, where a call returns when its work is done (on a CPU).

The runner measures one step of several. In the others the kernels are called directly, so that they cost nothing more.
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
    """The seconds of the steps that were measured, in sum and by part; `kernels` are to be used in their place."""

    def __init__(self, kernels: Kernels) -> None:
        self._attention = _Timed(kernels.attention, ("plan", "attend"))
        self._lora = _Timed(kernels.lora, ("plan", "shrink", "defer", "expand")) if kernels.lora is not None else None
        self.kernels = replace(
            kernels,
            attention=cast(AttentionBackend, self._attention),
            lora=None if self._lora is None else cast(LoraBackend, self._lora),
        )
        self._num_seen = self._num_measured = 0
        self._seconds = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure the step in the body, if its turn has come."""
        self._num_seen += 1
        if self._num_seen % _EVERY:
            yield
            return
        parts = [part for part in (self._attention, self._lora) if part is not None]
        for part in parts:
            part.timing(True)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - began
            self._num_measured += 1
            for part in parts:
                part.timing(False)

    def sums(self) -> dict[str, float]:
        """Return the number of steps that were measured and their seconds: in sum, in adapters and in attention."""
        adapters = 0.0 if self._lora is None else self._lora.seconds
        parts = {"adapters": adapters, "attention": self._attention.seconds}
        return {"steps": self._num_measured, "seconds": self._seconds, **parts}
