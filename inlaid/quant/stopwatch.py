"""The seconds of a quantizing job, by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by part, those of the device included. Parts may lie inside one another: a second counts for the
    innermost.
    """

    def __init__(self, device: torch.device, pause: Callable[[], object] | None = None) -> None:
        """Count from zero; `pause` is what `rest` calls."""
        self.seconds: dict[str, float] = {}
        self._device, self._since = device, 0.0
        self._open: list[str] = []
        self._pause = pause

    def rest(self) -> None:
        """Let the job rest between two pieces of work, where its share of the device is bounded."""
        if self._pause is not None:
            with self.part("resting"):
                self._pause()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Attribute the time of the `with` body to `name`."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> None:
        """Attribute the time since the last border to the part that is open."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
