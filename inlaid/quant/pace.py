"""The pace of a job that shares its device with a server: after each piece of work it sleeps until its share of time
is kept.

The share is of one device's time: on a GPU the work is waited for before it is measured, on a CPU it is wall time of
the job's one thread, hence the same share of a core.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from inlaid.quant.settings import QuantizeError

SHORTEST = 0.005  # seconds of work that are gathered before a rest, as shorter sleeps are not kept by the system


class Pace:
    """Sleep so that work takes at most `share` of the time. Called between pieces of work."""

    def __init__(
        self,
        share: float,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if not 0 < share <= 1:
            raise QuantizeError(f"the share of the device is {share}: give a number above 0, up to 1")
        self.rested = 0.0
        self._share, self._device, self._clock, self._sleep = share, device, clock, sleep
        self._since = clock()

    def __call__(self) -> None:
        if self._share == 1:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        worked = self._clock() - self._since
        if worked < SHORTEST:
            return
        rest = worked * (1 / self._share - 1)
        self.rested += rest
        self._sleep(rest)
        self._since = self._clock()
