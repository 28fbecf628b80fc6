"""Adapters that are still on their way to the device while a step uses them. At each linear the step waits until the
adapters at work have landed as far as its layer.

The runner plans a step with `Arriving`; layers/linear.py calls `before` ahead of its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from inlaid.kernels.backend import MODULES, Site


class Arrivals(Protocol):
    """The progress of the adapter in each slot. The store fulfils it."""

    def landed(self, slot: int, layer: int) -> bool:
        """Return whether what is computed from now on finds this layer in place."""
        ...

    def all_landed(self, slot: int) -> bool: ...

    def num_bytes(self, slot: int) -> int: ...

    def wait(self, slot: int, layer: int) -> None:
        """Make what is computed from now on find this layer in place; raise RuntimeError when it does not come."""
        ...


class Arriving:
    """The adapters of one step that are not whole.

    A step that asks layer by layer takes longer on a GPU, by `patience` seconds: it gets its kernels one by one instead
    of replaying a graph. Adapters that come in less time are waited for whole; `seconds_for` a number of bytes is the
    time of their way."""

    def __init__(self, arrivals: Arrivals, num_layers: int, seconds_for: Callable[[int], float] | None = None) -> None:
        self.arrivals = arrivals
        self.patience = 0.0
        self._seconds_for = seconds_for
        self._last_layer = num_layers - 1
        self._coming: list[int] = []  # slots

    def plan(self, slots: Iterable[int]) -> bool:
        """Note the slots of the next step; return whether any of their adapters is still coming."""
        self._coming = [slot for slot in dict.fromkeys(slots) if slot and not self.arrivals.all_landed(slot)]
        return bool(self._coming)

    def is_soon_whole(self) -> bool:
        """Return whether all that is coming may be waited for."""
        if self._seconds_for is None or not self.patience:
            return False
        return self._seconds_for(sum(map(self.arrivals.num_bytes, self._coming))) < self.patience

    def wait_for_all(self) -> None:
        """Wait for every layer, for a step that does not ask layer by layer."""
        for slot in self._coming:
            self.arrivals.wait(slot, self._last_layer)
        self._coming = []

    def before(self, site: Site) -> None:
        """Make a site's adapters ready for the device's kernels."""
        layer = site.first // len(MODULES)
        for slot in self._coming:
            if not self.arrivals.landed(slot, layer):
                self.arrivals.wait(slot, layer)
