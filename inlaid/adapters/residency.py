"""The tier of each adapter (disk, host memory, device), and the time when a request may start on it. Requests want,
pin and unpin; the rule of eviction says who makes room; the modes say what "ready" means.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from inlaid.adapters.device import DeviceMemory
from inlaid.adapters.eviction import Eviction, in_order
from inlaid.adapters.held import Held
from inlaid.adapters.host import HostMemory
from inlaid.adapters.modes import CACHED


class Residency:
    """The moves of adapters between the tiers."""

    def __init__(
        self,
        device: DeviceMemory,
        host: HostMemory,
        eviction: Eviction,
        max_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self.device, self.host = device, host
        self.max_seconds = max_seconds
        self._eviction = eviction
        self._now = clock

    def want(self, held: Held) -> None:
        """Bring an adapter one step nearer to the device. Cheap, may be repeated."""
        self._eviction.touch(held, held.reload_cost)
        if held.resident is not None or held.failed is not None:
            return
        if self.host.fetch(held, self._eviction.clock):
            assert held.flat is not None
            if self._place(held, self._idle()):
                self._upload(held, held.flat)
            else:
                held.asked = None  # it waits for room, not for its bytes
        elif held.reading is not None and held.asked is None:
            held.asked = self._now()

    def ready(self, held: Held) -> bool:
        """Say whether a request may start on it. RuntimeError, TimeoutError: why it does not come."""
        resident = held.resident
        if resident is not None and self.device.may_start(resident):
            return True
        held.failed = held.failure
        if held.asked is not None and self._now() - held.asked > self.max_seconds:
            held.failed = TimeoutError(f"it did not arrive within {self.max_seconds:g} s")
        if held.failed is not None:
            raise held.failed.with_traceback(None)
        return False

    def pin(self, held: Held) -> None:
        """Let a scheduled request use it: it stays where it is until the matching unpin."""
        held.pins += 1
        if held.resident is not None:
            held.counts.hits += held.was_used
            held.popularity += 1
            held.was_used = True
        self._eviction.touch(held, held.reload_cost)

    def retry(self, held: Held) -> None:
        """Forget that it could not be had: a new request tries again."""
        if held.failure is not None and not held.pins:
            held.failed = None
            self.device.remove(held)

    def take(self, held: Held, flat: torch.Tensor) -> None:
        """Keep the weights of an adapter that has just been read, if there is room for them."""
        self.host.keep(held, flat, self._eviction.clock)

    def load_now(self, held: Held, flat: torch.Tensor, instead_of: Held | None) -> bool:
        """Load to the device at once, if there is room, or will be without the adapter that it replaces."""
        if not self._place(held, [] if instead_of is None else [instead_of]):
            return False
        self._upload(held, flat)
        return True

    def _upload(self, held: Held, flat: torch.Tensor) -> None:
        """Copy an adapter to its place. If a device of a group cannot take it, it is on none, and its requests end."""
        try:
            self.device.upload(held, flat)
        except RuntimeError as error:
            self.device.remove(held)
            held.failed = error

    def drop(self, held: Held) -> None:
        """Give up its memory in all tiers."""
        self.device.remove(held)
        self.host.drop(held)

    def give_back(self, count: int, keep: str | None) -> list[int]:
        """Return up to `count` borrowed blocks, at the cost of idle adapters other than `keep`."""
        back = self.device.withdraw(count)
        for held in self._idle():
            if len(back) >= count:
                break
            if held.identity != keep and self.device.borrows(held):
                self._evict(held)
                back += self.device.withdraw(count - len(back))
        return back

    def tier(self, held: Held) -> str:
        """Name the fastest tier that holds all of it: "device", "host" or "disk"."""
        if held.resident is not None and not held.is_arriving:
            return "device"
        return "host" if held.flat is not None else "disk"

    def _idle(self) -> list[Held]:
        """Adapters that may leave the device, the least valuable first; in mode cached there are none."""
        return [] if self.device.mode == CACHED else in_order(filter(self._may_leave, self.device.held))

    def _may_leave(self, held: Held) -> bool:
        if held.kept or held.resident is None:
            return False
        is_coming = held.failure is None and not self.device.may_start(held.resident)
        return self._eviction.may_leave(held, is_coming)

    def _place(self, held: Held, leaving: list[Held]) -> bool:
        if not self.device.place(held, leaving, self._evict):
            return False
        self._eviction.arrive(held)
        return True

    def _evict(self, held: Held) -> None:
        self._eviction.evict(held)
        held.counts.evictions += 1
        held.counts.fetch_seconds = 0.0
        self.device.remove(held)
