"""The pace of a job that shares its device with a server: after each piece of work it sleeps until its share of time
is kept.

On a CPU the work is the process's processor time, so that a job which waits for a core does not rest on top of it. On a
GPU it is the time until the device has done what was asked of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from inlaid.quant.settings import QuantizeError

SHORTEST = 0.005  # seconds of work that are gathered before a rest, as shorter sleeps are not kept by the system


class Pace:
    """Sleep so that work takes at most `share` of the time, from the first call on. Called between pieces of work."""

    def __init__(
        self,
        share: float,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
        work: Callable[[], float] | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """`work` counts the seconds worked so far; without it as the device has it."""
        if not 0 < share <= 1:
            raise QuantizeError(f"the share of the device is {share}: give a number above 0, up to 1")
        self._share, self._device, self._clock, self._sleep = share, device, clock, sleep
        self._work = work or (clock if device.type == "cuda" else time.process_time)
        self._since: tuple[float, float] | None = None  # time and work at the end of the last rest

    def __call__(self) -> None:
        if self._share == 1:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._since is None:  # what came before, as imports and reading, is no work on the device
            self._since = self._clock(), self._work()
            return
        elapsed, worked = self._clock() - self._since[0], self._work() - self._since[1]
        if worked < SHORTEST:
            return
        if (rest := worked / self._share - elapsed) > 0:
            self._sleep(rest)
        self._since = self._clock(), self._work()
