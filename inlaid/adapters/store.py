"""AdapterStore: names, identities, and which adapters are on the device. It fulfils the engine's AdapterDirectory; the
runner asks it for slots; loading and unloading while serving come through `add`, `replace` and `remove`, on the
engine's thread (reading files, which takes long, is `peft.read_adapter` and may run elsewhere).

An identity lives as long as a name or a request refers to it: a replaced or removed adapter serves the requests it
has, on its old weights, and goes with the last of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from inlaid.adapters.pages import PagePool
from inlaid.adapters.peft import Adapter, AdapterEntry, AdapterError
from inlaid.kernels.backend import MODULES, AdapterPages
from inlaid.model.spec import ModelSpec

_GRACE = 256  # wants that an adapter outlasts on the device before the request it was loaded for must run


@dataclass
class _Resident:
    """An adapter's place on the device: its slot and, per entry, where its elements start in the pool."""

    slot: int
    starts: list[int]
    copied: Any  # a CUDA event, or None where copies are immediate
    loaded: int  # the store's clock then
    used: bool = False  # whether it has been pinned since


@dataclass
class _Held:
    """One identity in host memory."""

    adapter: Adapter
    names: set[str] = field(default_factory=set)
    references: int = 0  # requests that resolved it and have not released it
    pins: int = 0  # scheduled requests that need it on the device
    resident: _Resident | None = None
    last_used: int = 0  # the store's clock when it was last wanted or pinned


class AdapterStore:
    """Adapters by name and identity; slot 0 of the device table is "no adapter"."""

    def __init__(
        self,
        spec: ModelSpec,
        max_resident: int,
        pool_elements: int,
        device: torch.device,
        dtype: torch.dtype,
        max_held: int = 4096,
    ) -> None:
        slots = max_resident + 1
        self.device = device
        self.max_held = max_held
        self.pages = AdapterPages(
            pool=torch.zeros(pool_elements, dtype=dtype, device=device),
            table=torch.zeros(slots, spec.num_sites, 3, dtype=torch.int64, device=device),
            scale=torch.zeros(slots, spec.num_sites, dtype=torch.float32, device=device),
            versions=[0] * slots,
        )
        self.space = PagePool(pool_elements)
        self._held: dict[str, _Held] = {}
        self._identity_of: dict[str, str] = {}
        self._free_slots = list(range(max_resident, 0, -1))
        self._clock = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    # Names

    def add(self, name: str, adapter: Adapter) -> str:
        """Serve an adapter under a new name; returns its identity."""
        if name in self._identity_of:
            raise AdapterError(f"adapter {name!r} is already loaded; unload it first, or load it in place")
        return self._bind(name, adapter)

    def replace(self, name: str, adapter: Adapter) -> str:
        """Let a name stand for other weights from the next request on (or for the first time)."""
        if self._identity_of.get(name) == adapter.identity:
            return adapter.identity
        old = self._identity_of.get(name)
        identity = self._bind(name, adapter)
        if old is not None:
            self._unname(name, old)
        return identity

    def remove(self, name: str) -> int:
        """Forget a name at once. Returns how many requests still run on it; its memory goes with the last."""
        identity = self._identity_of.pop(name, None)
        if identity is None:
            raise AdapterError(f"adapter {name!r} is not loaded; loaded: {', '.join(self.names()) or 'none'}")
        in_flight = self._held[identity].references
        self._unname(name, identity)
        return in_flight

    def names(self) -> list[str]:
        return sorted(self._identity_of)

    def identity(self, name: str) -> str | None:
        return self._identity_of.get(name)

    def path(self, name: str) -> str:
        return self._held[self._identity_of[name]].adapter.path

    # AdapterDirectory

    def resolve(self, name: str) -> str:
        if name not in self._identity_of:
            raise AdapterError(f"adapter {name!r} is not loaded; loaded: {', '.join(self.names()) or 'none'}")
        identity = self._identity_of[name]
        self._held[identity].references += 1
        return identity

    def release(self, identity: str) -> None:
        held = self._held[identity]
        assert held.references > 0, "released more often than resolved"
        held.references -= 1
        self._drop_if_unused(identity)

    def ready(self, identity: str) -> bool:
        held = self._held.get(identity)
        if held is None:
            raise RuntimeError(f"adapter {identity[:12]} is no longer loaded")
        resident = held.resident
        return resident is not None and (resident.copied is None or resident.copied.query())

    def want(self, identity: str) -> None:
        held = self._held[identity]
        self._touch(held)
        if held.resident is None and self._make_room(held):
            self._upload(held)

    def pin(self, identity: str) -> None:
        held = self._held[identity]
        held.pins += 1
        self._touch(held)
        if held.resident is not None:
            held.resident.used = True

    def unpin(self, identity: str) -> None:
        held = self._held[identity]
        assert held.pins > 0, "unpinned more often than pinned"
        held.pins -= 1
        self._drop_if_unused(identity)

    def rank(self, identity: str) -> int:
        return self._held[identity].adapter.rank

    def sites(self, identity: str) -> tuple[int, ...]:
        """Where it acts."""
        return tuple(entry.site for entry in self._held[identity].adapter.entries)

    def nbytes(self, identity: str) -> int:
        """Bytes of its weights, on the host as on the device."""
        return int(self._held[identity].adapter.flat.nbytes)

    def references(self, identity: str) -> int:
        """Requests that hold it now."""
        return self._held[identity].references

    # The device

    def slot(self, identity: str | None) -> int:
        """Where the adapter of a scheduled request is in the tables."""
        if identity is None:
            return 0
        resident = self._held[identity].resident
        assert resident is not None, f"adapter {identity[:12]} was scheduled but is not on the device"
        return resident.slot

    def resident(self) -> list[str]:
        """Identities on the device now."""
        return [identity for identity, held in self._held.items() if held.resident is not None]

    @property
    def used_bytes(self) -> int:
        return self.space.used * self.pages.pool.element_size()

    @property
    def capacity_bytes(self) -> int:
        return self.space.size * self.pages.pool.element_size()

    @property
    def host_bytes(self) -> int:
        return sum(held.adapter.flat.nbytes for held in self._held.values())

    def check(self) -> None:
        """Every element, slot and reference is accounted for."""
        self.space.check()
        residents = [(held, held.resident) for held in self._held.values() if held.resident is not None]
        slots = [resident.slot for _, resident in residents]
        assert sorted([*slots, *self._free_slots]) == list(range(1, self.pages.table.shape[0])), "slots"
        assert self.space.used == sum(held.adapter.flat.numel() for held, _ in residents), "elements"
        taken = sorted(
            (start, start + _size(entry))
            for held, resident in residents
            for entry, start in zip(held.adapter.entries, resident.starts, strict=True)
        )
        assert all(a[1] <= b[0] for a, b in pairwise(taken)), "extents overlap"
        table_ranks = self.pages.table[:, :, 2]
        for slot in (0, *self._free_slots):
            assert not table_ranks[slot].any(), f"free slot {slot} is not empty"
        for name, identity in self._identity_of.items():
            assert name in self._held[identity].names, f"name {name}"
        for identity, held in self._held.items():
            assert held.names or held.references or held.pins, f"{identity} is held for nobody"

    def _bind(self, name: str, adapter: Adapter) -> str:
        if adapter.flat.numel() > self.space.size:
            need, have = adapter.flat.nbytes, self.capacity_bytes
            raise AdapterError(
                f"adapter {name!r} needs {need} bytes of the {have} for adapters; raise --adapter-memory-gib"
            )
        held = self._held.get(adapter.identity)
        if held is None:
            if len(self._held) >= self.max_held:
                raise AdapterError(
                    f"{self.max_held} adapters are loaded, the most allowed; unload one or raise --max-cpu-loras"
                )
            if self._stream is not None:
                adapter = Adapter(adapter.identity, adapter.path, adapter.flat.pin_memory(), adapter.entries)
            held = self._held[adapter.identity] = _Held(adapter)
        held.names.add(name)
        self._identity_of[name] = adapter.identity
        return adapter.identity

    def _unname(self, name: str, identity: str) -> None:
        self._held[identity].names.discard(name)
        self._drop_if_unused(identity)

    def _drop_if_unused(self, identity: str) -> None:
        held = self._held[identity]
        if not held.names and not held.references and not held.pins:
            self._evict(held)
            del self._held[identity]

    def _make_room(self, held: _Held) -> bool:
        """Free a slot and elements by evicting what was used longest ago; False when all else is in use."""
        sizes = [_size(entry) for entry in held.adapter.entries]
        idle = sorted(filter(self._evictable, self._held.values()), key=lambda other: other.last_used)
        while True:
            starts = self.space.take(sizes) if self._free_slots else None
            if starts is not None:
                held.resident = _Resident(self._free_slots.pop(), starts, None, self._clock)
                return True
            if not idle:
                return False
            self._evict(idle.pop(0))

    def _evictable(self, held: _Held) -> bool:
        """Not while pinned; nor, for a while, when it was loaded for a request that has not come to run yet: two
        adapters that are wanted at the same time would else push each other out for ever."""
        resident = held.resident
        if resident is None or held.pins:
            return False
        return resident.used or not held.references or self._clock - resident.loaded > _GRACE

    def _touch(self, held: _Held) -> None:
        self._clock += 1
        held.last_used = self._clock

    def _evict(self, held: _Held) -> None:
        resident, held.resident = held.resident, None
        if resident is None:
            return
        for entry, start in zip(held.adapter.entries, resident.starts, strict=True):
            self.space.give(start, _size(entry))
        self.pages.table[resident.slot].zero_()
        self.pages.scale[resident.slot].zero_()
        self.pages.versions[resident.slot] += 1
        self._free_slots.append(resident.slot)

    def _upload(self, held: _Held) -> None:
        """Copy to the device: on a side stream behind the work already queued, or at once on a CPU."""
        resident = held.resident
        assert resident is not None
        if self._stream is None:
            self._copy(held, resident)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                self._copy(held, resident)
                resident.copied = torch.cuda.Event()
                resident.copied.record()
        self.pages.versions[resident.slot] += 1

    def _copy(self, held: _Held, resident: _Resident) -> None:
        entries, pool, flat = held.adapter.entries, self.pages.pool, held.adapter.flat
        for begin, end in _runs(entries, resident.starts):
            start, stop = entries[begin].a_start, entries[end - 1].end
            target = resident.starts[begin]
            pool[target : target + stop - start].copy_(flat[start:stop], non_blocking=True)
        table = np.zeros((self.pages.table.shape[1], 3), dtype=np.int64)
        scale = np.zeros(self.pages.table.shape[1], dtype=np.float32)
        for entry, start in zip(entries, resident.starts, strict=True):
            table[entry.site] = start, start + entry.b_start - entry.a_start, entry.rank
            scale[entry.site] = entry.scale
        for target_row, row in ((self.pages.table, table), (self.pages.scale, scale)):
            host = torch.from_numpy(row)
            if self._stream is not None:  # from pinned memory the copy does not hold up the step loop
                host = host.pin_memory()
            target_row[resident.slot].copy_(host, non_blocking=True)


def default_pool_elements(spec: ModelSpec, max_resident: int, rank: int = 16) -> int:
    """Room for that many adapters of this rank on every linear: what a server gets when it names no size."""
    per_rank = sum(sum(spec.module_shape(module)) for module in MODULES) * spec.num_layers
    return max_resident * rank * per_rank


def _size(entry: AdapterEntry) -> int:
    return entry.end - entry.a_start


def _runs(entries: Iterable[AdapterEntry], starts: list[int]) -> list[tuple[int, int]]:
    """Entries that lie side by side in the pool as they do in the adapter, [begin, end), to be copied at once."""
    listed, runs, begin = list(entries), [], 0
    for index in range(1, len(listed) + 1):
        if index == len(listed) or starts[index] != starts[index - 1] + _size(listed[index - 1]):
            runs.append((begin, index))
            begin = index
    return runs
