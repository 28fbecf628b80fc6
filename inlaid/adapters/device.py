"""Adapters on the device: slots, pages of the pool, the tables that kernels read, and adapters that are still arriving.
Which adapter is to be here is the residency's decision; this carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import torch

from inlaid.adapters.adapter import EMBEDDING, EMBEDDING_ROWS, HEAD, HEAD_ROWS, AdapterEntry, site_shape
from inlaid.adapters.held import Held, Resident
from inlaid.adapters.loader import AnyLoader, Arrival, CudaLane, StreamLoader
from inlaid.adapters.modes import NUM_GROUPS, groups_to_start
from inlaid.adapters.pages import Lender, PagePool
from inlaid.adapters.tables import clear, copies, empty_pages, show, size
from inlaid.kernels.vocabulary import Change, LowRank, Replaced, VocabularyChange
from inlaid.model.spec import ModelSpec


class Mirror(Protocol):
    """The other devices of a tensor-parallel group, which have their parts of the same adapters at the same places."""

    def upload(self, slot: int, entries: Sequence[AdapterEntry], starts: Sequence[int], flat: torch.Tensor) -> None:
        """Bring each device its part of `flat`, then show it to steps on all; RuntimeError: on none."""
        ...

    def clear(self, slot: int) -> None:
        """Empty a slot, for all steps that follow."""
        ...


class DeviceMemory:
    """Slots 1 to `slots` and the pool behind them; slot 0 is "no adapter"."""

    def __init__(
        self,
        spec: ModelSpec,
        slots: int,
        pool_elements: int,
        device: torch.device,
        dtype: torch.dtype,
        mode: str,
        loader: AnyLoader | None,
        clock: Callable[[], float],
        shared: bool,
        mirror: Mirror | None = None,
    ) -> None:
        self.pages = empty_pages(spec, slots + 1, 0 if shared else pool_elements, device, dtype)
        self.space = PagePool(pool_elements)
        self.floor = pool_elements  # elements that it always has
        self.mode = mode
        self._spec, self._now = spec, clock
        self._loader = StreamLoader(CudaLane(device)) if loader is None and device.type == "cuda" else loader
        self._lender: Lender | None = None
        self._mirror = mirror
        self._unit = self._borrowed_from = 0  # elements in a lent block, and where such blocks begin
        self._at: dict[int, Held] = {}  # by slot
        self._free_slots = list(range(slots, 0, -1))
        self._layers_per_group = -(-spec.num_layers // NUM_GROUPS)
        self._num_groups = -(-spec.num_layers // self._layers_per_group)

    @property
    def slots(self) -> int:
        return self.pages.table.shape[0] - 1

    @property
    def groups_to_start(self) -> int:
        """Layer groups that must have landed before a request may start."""
        return groups_to_start(self.mode, self._num_groups)

    @property
    def held(self) -> list[Held]:
        """Adapters that have a slot."""
        return list(self._at.values())

    def move_into(self, memory: torch.Tensor, unit: int, first: int, lender: Lender) -> None:
        """Share memory with the KV cache, block by block: blocks 1 to `first` - 1 are its own, others it may borrow."""
        assert not self._at, "before anything is loaded"
        self.pages.pool = memory
        self.space = PagePool(0)
        self.floor = (first - 1) * unit
        if self.floor:
            self.space.grant(unit, self.floor)
        self._lender, self._unit, self._borrowed_from = lender, unit, first * unit

    # Room

    def place(self, held: Held, leaving: list[Held], evict: Callable[[Held], None]) -> bool:
        """Give an adapter a slot and elements, evicting some of `leaving` in order; False if that frees too little."""
        sizes = [size(entry) for entry in held.entries]
        ways = [] if self._lender is None else [False, True]  # KV blocks that are free; later, cached prefixes
        while True:
            starts = self.space.take(sizes) if self._free_slots else None
            if starts is not None:
                held.resident = Resident(self._free_slots.pop(), starts)
                self._at[held.resident.slot] = held
                return True
            if self._free_slots and ways and not (ways[0] and leaving):
                self._borrow(sum(sizes), ways.pop(0))
                continue
            if not leaving:
                return False
            evict(leaving.pop(0))

    def _borrow(self, elements: int, cached: bool) -> None:
        assert self._lender is not None
        for block in self._lender.lend(-(-elements // self._unit), cached):
            self.space.grant(block * self._unit, self._unit)

    def withdraw(self, count: int) -> list[int]:
        """Give back up to `count` borrowed blocks that no adapter uses; returns their numbers."""
        return self.space.withdraw(self._unit, self._borrowed_from, count)

    def borrows(self, held: Held) -> bool:
        """Say whether an adapter lies in borrowed blocks, be it in part."""
        assert held.resident is not None
        ends = (start + size(entry) for entry, start in zip(held.entries, held.resident.starts, strict=True))
        return any(end > self._borrowed_from for end in ends)

    def remove(self, held: Held) -> None:
        """Free an adapter's slot and elements, if it has some."""
        resident, held.resident, held.popularity, held.asked = held.resident, None, 0, None
        if resident is None:
            return
        if resident.arrival is not None:
            resident.arrival.end()
        for entry, start in zip(held.entries, resident.starts, strict=True):
            self.space.give(start, size(entry))
        del self._at[resident.slot]
        clear(self.pages, resident.slot)
        if self._mirror is not None:
            self._mirror.clear(resident.slot)
        self._free_slots.append(resident.slot)

    # Bytes

    def upload(self, held: Held, flat: torch.Tensor) -> None:
        """Copy an adapter to its place: by the loader, or at once. RuntimeError: another device could not take it."""
        resident = held.resident
        assert resident is not None
        if self._mirror is not None:
            self._mirror.upload(resident.slot, held.entries, resident.starts, flat)
        held.counts.loads += 1
        held.asked = self._now()
        moves = copies(self.pages.pool, held.entries, resident.starts, flat, self._num_groups, self._layers_per_group)
        if self._loader is not None:
            resident.arrival = self._loader.start(moves, self._now)
        else:
            for target, source in (move for group in moves for move in group):
                target.copy_(source)
            held.counts.seconds = self._now() - held.asked
        show(self.pages, resident.slot, held.entries, resident.starts)

    def may_start(self, resident: Resident) -> bool:
        """Say whether so much of an adapter has landed that its requests may run."""
        arrival = resident.arrival
        return arrival is None or (arrival.error is None and arrival.landed >= self.groups_to_start)

    # Arrivals: what the forward asks while adapters are still coming

    def num_landed(self, slot: int) -> int:
        """Count the layer groups that are in place."""
        arrival = self.arrival(slot)
        return self._num_groups if arrival is None else arrival.landed

    def landed(self, slot: int, layer: int) -> bool:
        return self.num_landed(slot) > layer // self._layers_per_group

    def all_landed(self, slot: int) -> bool:
        return self.num_landed(slot) >= self._num_groups

    def wait(self, slot: int, layer: int, seconds: float) -> None:
        """Wait for a layer. RuntimeError when it does not come."""
        arrival = self.arrival(slot)
        if arrival is not None:
            arrival.wait(layer // self._layers_per_group, seconds)

    def arrival(self, slot: int) -> Arrival | None:
        held = self._at.get(slot)
        return held.resident.arrival if held is not None and held.resident is not None else None

    def num_bytes(self, slot: int) -> int:
        return self._at[slot].nbytes

    # The embedding and the head

    def vocabulary(self, slot: int) -> VocabularyChange | None:
        """Return what the adapter in a slot does to the embedding and the head, if anything."""
        held = self._at[slot]
        assert held.resident is not None
        if held.entries[0].site >= 0:  # such entries come first
            return None
        starts = zip(held.entries, held.resident.starts, strict=True)
        found = {entry.site: self._change(entry, start, held.resident) for entry, start in starts if entry.site < 0}
        embedding, head = (found.get(a) or found.get(b) for a, b in ((EMBEDDING, EMBEDDING_ROWS), (HEAD, HEAD_ROWS)))
        return VocabularyChange(slot, embedding, head)

    def _change(self, entry: AdapterEntry, start: int, resident: Resident) -> Change:
        pool = self.pages.pool
        if entry.rank:
            flat = pool[start : start + size(entry)]
            own = replace(entry, a_start=0, b_start=entry.b_start - entry.a_start)
            return LowRank(*own.factors(flat, site_shape(self._spec, entry.site)), entry.scale)
        width = self._spec.hidden_size
        rows_nD = pool[start : start + entry.num_rows * width].view(entry.num_rows, width)
        if not entry.tokens:
            return Replaced(None, rows_nD)
        if entry.site not in resident.tokens:
            resident.tokens[entry.site] = torch.tensor(entry.tokens, device=pool.device)
        return Replaced(resident.tokens[entry.site], rows_nD)

    def check(self) -> None:
        """Assert that every slot and element is accounted for."""
        self.space.check()
        residents = [(held, held.resident) for held in self.held if held.resident is not None]
        slots = [resident.slot for _, resident in residents]
        assert sorted([*slots, *self._free_slots]) == list(range(1, self.slots + 1)), "slots"
        assert self.space.used == sum(held.num_elements for held, _ in residents), "elements"
        assert self._at == {resident.slot: held for held, resident in residents}, "who is where"
        taken = sorted(
            (start, start + size(entry))
            for held, resident in residents
            for entry, start in zip(held.entries, resident.starts, strict=True)
        )
        assert all(a[1] <= b[0] for a, b in pairwise(taken)), "extents overlap"
        for slot in (0, *self._free_slots):
            assert not self.pages.table[slot, :, 2].any(), f"free slot {slot} is not empty"
