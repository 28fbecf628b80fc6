"""How an adapter gets from host memory to a device without a copy stream: a thread copies it layer group by layer
group, one adapter after the other, while the step loop goes on. The store gives it transfers; the forward waits on
their arrivals. A link model makes a copy take as long as it would over a bus, for experiments without a GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

Copy = tuple[torch.Tensor, torch.Tensor]  # to, from

NUM_GROUPS = 4  # of layers, as many as the model has at most; a step may start when the first has landed


class Arrival:
    """How many layer groups of one adapter have landed. The loader writes it; anyone reads it."""

    def __init__(self, num_groups: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_groups = num_groups
        self.landed = 0
        self.error: str | None = None
        self.cancelled = False
        self.seconds = 0.0  # from being asked for to being there
        self._clock = clock
        self.asked = clock()
        self._changed = threading.Condition()

    @property
    def whole(self) -> bool:
        return self.landed >= self.num_groups

    def land(self) -> None:
        """One more group is there."""
        with self._changed:
            self.landed += 1
            self.seconds = self._clock() - self.asked
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        with self._changed:
            self.error = reason
            self._changed.notify_all()

    def wait(self, group: int, timeout: float) -> None:
        """Until that group has landed; RuntimeError when it does not."""
        with self._changed:
            self._changed.wait_for(lambda: self.landed > group or self.error is not None, timeout)
            if self.landed <= group:
                raise RuntimeError(self.error or f"an adapter did not arrive within {timeout:g} s")


@dataclass(frozen=True)
class Transfer:
    """The copies of one adapter, by layer group."""

    groups: list[list[Copy]]
    arrival: Arrival

    def copy_next(self) -> int:
        """Copy the group that is next, without calling it landed. Its bytes."""
        copies = self.groups[self.arrival.landed]
        for target, source in copies:
            target.copy_(source)
        return sum(source.nbytes for _, source in copies)


class Loader:
    """One thread, first come first served. Later transfers may take the place of cancelled earlier ones: their copies
    come after, as on a stream."""

    def __init__(self, gigabytes_per_second: float = 0.0) -> None:
        self._rate = gigabytes_per_second * 1e9
        self._thread = ThreadPoolExecutor(1, "adapter-loader")

    def start(self, transfer: Transfer) -> None:
        self._thread.submit(self._run, transfer)

    def _run(self, transfer: Transfer) -> None:
        arrival = transfer.arrival
        try:
            while not arrival.cancelled and not arrival.whole:
                began = time.monotonic()
                nbytes = transfer.copy_next()
                if self._rate:
                    time.sleep(max(0.0, nbytes / self._rate - (time.monotonic() - began)))
                arrival.land()
        except Exception as error:  # noqa: BLE001 - whatever went wrong, who waits for it must hear of it
            arrival.fail(f"copying an adapter to the device failed: {type(error).__name__}: {error}")
