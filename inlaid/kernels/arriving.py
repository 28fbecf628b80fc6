"""Adapters that are still on their way to the device while a step uses them. At each linear the step waits until the
adapters at work have landed as far as its layer; or, assisted, their part is computed from host memory. Around the
device's own adapter kernels, which compute everything that is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from inlaid.kernels.backend import MODULES, AdapterPages, LoraBackend, Site
from inlaid.kernels.context import StepContext


class Arrivals(Protocol):
    """How far the adapter in each slot has come. The store fulfils it."""

    def landed(self, slot: int, layer: int) -> bool: ...

    def all_landed(self, slot: int) -> bool: ...

    def wait(self, slot: int, layer: int) -> None:
        """Until it has landed so far. RuntimeError when it does not."""
        ...

    def host_matrices(self, slot: int, site: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B from their first elements on, flat, in host memory, of a slot where not all has landed."""
        ...


@dataclass(frozen=True)
class _Assisted:
    """What is to be added to the output: rows, the first column, and the values."""

    parts: list[tuple[torch.Tensor, int, torch.Tensor]]


class ArrivingLora:
    """The adapter kernels of a mode in which steps start before their adapters are whole."""

    def __init__(self, inner: LoraBackend, pages: AdapterPages, arrivals: Arrivals, assist: bool) -> None:
        self.inner = inner
        self.pages = pages
        self.arrivals = arrivals
        self.assist = assist
        self._coming: list[int] = []  # slots of this step that are not whole
        self._rows: dict[int, torch.Tensor] = {}  # of each slot of this step, when some are computed here

    def plan(self, context: StepContext) -> None:
        active = set(context.adapter_slots) - {0}
        coming = [slot for slot in range(1, len(self.pages.versions)) if not self.arrivals.all_landed(slot)]
        for slot in set(coming) - active:
            self.pages.versions[slot] += 1  # nothing may be derived from it now, and it is not waited for
        self._coming = [slot for slot in coming if slot in active]
        self._rows = {}
        if self._coming and self.assist:
            slots_T = context.adapter_slots_T
            self._rows = {slot: torch.nonzero(slots_T == slot).flatten() for slot in sorted(active)}
        self.inner.plan(context)

    def shrink(self, x_TK: torch.Tensor, site: Site, context: StepContext) -> Any:
        layer = site.first // len(MODULES)
        late = [slot for slot in self._coming if not self.arrivals.landed(slot, layer)]
        if late and self.assist:
            parts = [self._parts(slot, slot in late, x_TK, site) for slot in self._rows]
            return _Assisted([part for some in parts for part in some])
        for slot in late:
            self.arrivals.wait(slot, layer)
        return self.inner.shrink(x_TK, site, context)

    def expand(self, shrunk: Any, site: Site, out_TN: torch.Tensor, context: StepContext) -> None:
        if not isinstance(shrunk, _Assisted):
            self.inner.expand(shrunk, site, out_TN, context)
            return
        for rows, column, delta_MN in shrunk.parts:
            out_TN[:, column : column + delta_MN.shape[1]].index_add_(0, rows, delta_MN)

    def _parts(
        self, slot: int, late: bool, x_TK: torch.Tensor, site: Site
    ) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
        """What one adapter adds to siblings of one input, computed where its weights are."""
        rows, parts, column = self._rows[slot], [], 0
        x_MK, pool = x_TK.index_select(0, rows), self.pages.pool
        for number, width in zip(site.sites, site.widths, strict=True):
            a_start, b_start, rank = self.pages.table[slot, number].tolist()
            if rank:
                a, b = self.arrivals.host_matrices(slot, number) if late else (pool[a_start:], pool[b_start:])
                a_RK, b_NR = a[: rank * x_TK.shape[1]].view(rank, -1), b[: width * rank].view(width, rank)
                delta_MN = (x_MK.to(a.device) @ a_RK.t()) @ b_NR.t() * self.pages.scale[slot, number].item()
                parts.append((rows, column, delta_MN.to(x_TK.device)))
            column += width
        return parts
