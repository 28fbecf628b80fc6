"""Adapters that are still on their way to the device while a step uses them. At each linear the step waits until the
adapters at work have landed as far as its layer. With an assistant their part is computed from host memory instead: the
device's tables show a layer only when it has landed, so its kernels leave an adapter alone until then.

The runner plans a step with `Arriving`; layers/linear.py calls `before` and `after` around its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch

from inlaid.kernels.assist import Assistant, Factors, Job
from inlaid.kernels.backend import MODULES, Site

Ranges = Sequence[tuple[int, int]]  # rows [begin, end)


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

    def host_factors(self, slot: int, site: int) -> Factors | None:
        """Return the matrices in host memory of an adapter that has not landed; None: it does not act at this site."""
        ...


class Arriving:
    """The adapters of one step that are not whole. With an assistant the CPU computes what has not landed.

    A step that asks layer by layer takes longer on a GPU, by `patience` seconds: it gets its kernels one by one instead
    of replaying a graph. Adapters that come in less time are waited for whole; `seconds_for` a number of bytes is the
    time of their way."""

    def __init__(
        self,
        arrivals: Arrivals,
        num_layers: int,
        assistant: Assistant | None = None,
        seconds_for: Callable[[int], float] | None = None,
    ) -> None:
        self.arrivals = arrivals
        self.assistant = assistant
        self.patience = 0.0
        self._seconds_for = seconds_for
        self._last_layer = num_layers - 1
        self._coming: dict[int, Ranges] = {}

    def plan(self, rows_of: Mapping[int, Ranges]) -> bool:
        """Note the rows of each slot in the next step; return whether any of their adapters is still coming."""
        self._coming = {slot: rows for slot, rows in rows_of.items() if slot and not self.arrivals.all_landed(slot)}
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
        self._coming = {}

    def before(self, x_TK: torch.Tensor, site: Site) -> list[Job]:
        """Make a site's adapters ready for the device's kernels; return what the CPU computes beside them."""
        if not self._coming:
            return []
        layer = site.first // len(MODULES)
        late = [slot for slot in self._coming if not self.arrivals.landed(slot, layer)]
        if self.assistant is None:
            for slot in late:
                self.arrivals.wait(slot, layer)
            return []
        return [job for slot in late for job in self._jobs(self.assistant, slot, x_TK, site)]

    def after(self, jobs: Sequence[Job], out_TN: torch.Tensor) -> None:
        """Add the CPU's part."""
        if jobs:
            assert self.assistant is not None
            self.assistant.add(jobs, out_TN)

    def _jobs(self, assistant: Assistant, slot: int, x_TK: torch.Tensor, site: Site) -> list[Job]:
        factors = [self.arrivals.host_factors(slot, number) for number in site.sites]
        if all(factor is None for factor in factors):
            return []
        siblings = list(zip(site.widths, factors, strict=True))
        return [assistant.start(x_TK, begin, end, siblings) for begin, end in self._coming[slot]]


def rows_by_slot(sequences: Iterable[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    """Return the ranges of rows of each adapter slot, from (slot, number of rows) side by side."""
    found: dict[int, list[tuple[int, int]]] = {}
    row = 0
    for slot, length in sequences:
        if slot:
            found.setdefault(slot, []).append((row, row + length))
        row += length
    return found
