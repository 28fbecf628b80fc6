"""AdapterStore: names, identities, and which adapters are on the device. It fulfils the engine's AdapterDirectory; the
runner asks it for slots; loading and unloading while serving come through `add`, `replace` and `remove`, on the
engine's thread (reading files, which takes long, is `peft.read_adapter` and may run elsewhere).

An identity lives as long as a name or a request refers to it: a replaced or removed adapter serves the requests it
has, on its old weights, and goes with the last of them. Its weights move between three tiers: disk, host memory
(`host.py`) and the device. When a request may start is the mode's to say: in `cached` everything is on the device from
the start; `on-demand` waits for the whole adapter, `pipelined` for its first layer group, `cpu-assist` for none, as
what has not landed is computed from host memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import torch

from inlaid.adapters.host import GRACE, Counts, Held, HostMemory, Read, Resident
from inlaid.adapters.loader import NUM_GROUPS, AnyLoader, Arrival, CudaLane, StreamLoader
from inlaid.adapters.pages import Lender, PagePool
from inlaid.adapters.peft import Adapter, AdapterError
from inlaid.adapters.tables import clear, copies, empty_pages, show, size
from inlaid.kernels.assist import Factors
from inlaid.kernels.backend import MODULES
from inlaid.model.spec import ModelSpec

CACHED, ON_DEMAND, PIPELINED, CPU_ASSIST = MODES = ("cached", "on-demand", "pipelined", "cpu-assist")


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
        *,
        mode: str = ON_DEMAND,
        loader: AnyLoader | None = None,
        host_budget: int = 0,
        read: Read | None = None,
        max_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        shared: bool = False,
    ) -> None:
        """`shared`: memory is given to it later, see `move_into`; `pool_elements` is what it will have of its own."""
        on_gpu = device.type == "cuda"
        assert mode in (CACHED, ON_DEMAND) or loader is not None or on_gpu, f"{mode} needs a loader"
        assert read is not None or not host_budget, "what leaves host memory must be read again"
        slots = max_resident + 1
        self._spec = spec
        self.device = device
        self.max_held = max_held
        self.mode = mode
        self.max_seconds = max_seconds
        self.pages = empty_pages(spec, slots, 0 if shared else pool_elements, device, dtype)
        self.space = PagePool(pool_elements)
        self.floor = pool_elements  # what it always has
        self._lender: Lender | None = None
        self._unit = self._borrowed_from = 0  # elements in a lent block, and where such blocks begin
        self._held: dict[str, Held] = {}
        self._identity_of: dict[str, str] = {}
        self._at: dict[int, Held] = {}  # who is in a slot
        self._free_slots = list(range(max_resident, 0, -1))
        self._clock = 0  # counts wants and pins
        self._aging = 0.0  # the value of what was last evicted: what is kept unused falls behind it
        self._now = clock
        self._loader = StreamLoader(CudaLane(device)) if loader is None and on_gpu else loader
        self._host = HostMemory(self._held, host_budget, read, pin=on_gpu)
        self._layers_per_group = -(-spec.num_layers // NUM_GROUPS)
        self._num_groups = -(-spec.num_layers // self._layers_per_group)

    @property
    def _groups_to_start(self) -> int:
        """Layer groups that must have landed before a request may start."""
        return {PIPELINED: 1, CPU_ASSIST: 0}.get(self.mode, self._num_groups)

    def move_into(self, memory: torch.Tensor, unit: int, first: int, lender: Lender) -> None:
        """Share memory with the KV cache, block by block: blocks 1 to `first` - 1 are its own, others it may borrow."""
        assert not self._held, "before anything is loaded"
        self.pages.pool = memory
        self.space = PagePool(0)
        self.floor = (first - 1) * unit
        if self.floor:
            self.space.grant(unit, self.floor)
        self._lender, self._unit, self._borrowed_from = lender, unit, first * unit

    def give_back(self, count: int, keep: str | None) -> list[int]:
        """Up to so many borrowed blocks, at the cost of idle adapters other than this one."""
        back = self.space.withdraw(self._unit, self._borrowed_from, count)
        for held in self._idle():
            if len(back) >= count:
                break
            if held.identity != keep and self._borrows(held):
                self._aging = max(self._aging, held.value)
                held.counts.evictions += 1
                self._evict(held)
                back += self.space.withdraw(self._unit, self._borrowed_from, count - len(back))
        return back

    def _borrows(self, held: Held) -> bool:
        assert held.resident is not None
        ends = (start + size(entry) for entry, start in zip(held.entries, held.resident.starts, strict=True))
        return any(end > self._borrowed_from for end in ends)

    # Names

    def add(self, name: str, adapter: Adapter, keep: bool = False) -> str:
        """Serve an adapter under a new name; returns its identity. With `keep` it stays on the device."""
        if name in self._identity_of:
            raise AdapterError(f"adapter {name!r} is already loaded; unload it first, or load it in place")
        return self._bind(name, adapter, None, keep)

    def replace(self, name: str, adapter: Adapter, keep: bool | None = None) -> str:
        """Let a name stand for other weights from the next request on (or for the first time). `keep` None: as now."""
        old = self._held.get(self._identity_of.get(name, ""))
        keep = (old is not None and name in old.kept) if keep is None else keep
        if old is not None and old.identity == adapter.identity:
            if keep:
                self._check_kept(name, adapter, None)
            self._keep(name, old, keep)
            return old.identity
        identity = self._bind(name, adapter, old, keep)
        if old is not None:
            self._unname(name, old.identity)
        return identity

    def kept(self, name: str) -> bool:
        """Whether it stays on the device."""
        return name in self._held[self._identity_of[name]].kept

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
        return self._held[self._identity_of[name]].path

    # AdapterDirectory

    def resolve(self, name: str) -> str:
        if name not in self._identity_of:
            raise AdapterError(f"adapter {name!r} is not loaded; loaded: {', '.join(self.names()) or 'none'}")
        identity = self._identity_of[name]
        held = self._held[identity]
        held.references += 1
        if _failure(held) is not None and not held.pins:  # perhaps it can be had now
            held.failed = None
            self._evict(held)
        return identity

    def release(self, identity: str) -> None:
        held = self._held[identity]
        assert held.references > 0, "released more often than resolved"
        held.references -= 1
        self._drop_if_unused(identity)

    def ready(self, identity: str) -> bool:
        held = self._held.get(identity)
        if held is None:
            raise RuntimeError("it is no longer loaded")
        resident = held.resident
        if resident is not None and self._may_start(resident):
            return True
        held.failed = _failure(held)
        if held.asked is not None and self._now() - held.asked > self.max_seconds:
            held.failed = TimeoutError(f"it did not arrive within {self.max_seconds:g} s")
        if held.failed is not None:
            raise held.failed.with_traceback(None)
        return False

    def _may_start(self, resident: Resident) -> bool:
        arrival = resident.arrival
        return arrival is None or (arrival.error is None and arrival.landed >= self._groups_to_start)

    def want(self, identity: str) -> None:
        held = self._held[identity]
        self._touch(held)
        if held.resident is not None or held.failed is not None:
            return
        if self._host.fetch(held, self._clock):
            if self._make_room(held, self._idle()):
                self._upload(held)
            else:
                held.asked = None  # it waits for room, not for its bytes
        elif held.reading is not None and held.asked is None:
            held.asked = self._now()

    def pin(self, identity: str) -> None:
        held = self._held[identity]
        held.pins += 1
        resident = held.resident
        if resident is not None:
            held.counts.hits += resident.used
            held.popularity += 1
            resident.used = True
        self._touch(held)

    def unpin(self, identity: str) -> None:
        held = self._held[identity]
        assert held.pins > 0, "unpinned more often than pinned"
        held.pins -= 1
        self._drop_if_unused(identity)

    def rank(self, identity: str) -> int:
        return self._held[identity].rank

    def sites(self, identity: str) -> tuple[int, ...]:
        """Where it acts."""
        return tuple(entry.site for entry in self._held[identity].entries)

    def nbytes(self, identity: str) -> int:
        """Bytes of its weights, on the host as on the device."""
        return self._held[identity].nbytes

    def counts(self, identity: str) -> Counts:
        """What has happened to it."""
        held = self._held[identity]
        if held.resident is not None and held.resident.arrival is not None:
            held.counts.seconds = held.resident.arrival.seconds
        return held.counts

    def tier(self, identity: str) -> str:
        """The fastest place where all of it is: "device", "host" or "disk"."""
        held = self._held[identity]
        if held.resident is not None and not held.arriving:
            return "device"
        return "host" if held.flat is not None else "disk"

    def on_host(self, identity: str) -> bool:
        """Whether host memory holds it, be it on the device or not."""
        return self._held[identity].flat is not None

    def leaving(self, identity: str) -> int:
        """Requests that still run on weights which no name stands for any more; 0 when their memory is free."""
        held = self._held.get(identity)
        return 0 if held is None or held.names else max(held.references, held.pins)

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
    def floor_bytes(self) -> int:
        return self.floor * self.pages.pool.element_size()

    @property
    def host_bytes(self) -> int:
        return self._host.used

    # Arrivals: what the forward asks while adapters are still coming

    def landed(self, slot: int, layer: int) -> bool:
        return self._num_landed(slot) > layer // self._layers_per_group

    def all_landed(self, slot: int) -> bool:
        return self._num_landed(slot) >= self._num_groups

    def num_bytes(self, slot: int) -> int:
        return self._at[slot].nbytes

    def wait(self, slot: int, layer: int) -> None:
        arrival = self._arrival(slot)
        if arrival is not None:
            arrival.wait(layer // self._layers_per_group, self.max_seconds)
            self._num_landed(slot)

    def _num_landed(self, slot: int) -> int:
        """Layer groups that are in place; from now on the tables show them."""
        arrival = self._arrival(slot)
        if arrival is None:
            return self._num_groups
        landed, held = arrival.landed, self._at[slot]
        assert held.resident is not None
        if landed > held.resident.shown:
            self._show(held, held.resident, landed)
        return landed

    def _arrival(self, slot: int) -> Arrival | None:
        held = self._at.get(slot)
        return held.resident.arrival if held is not None and held.resident is not None else None

    def host_factors(self, slot: int, site: int) -> Factors | None:
        held = self._at[slot]
        assert held.flat is not None, "what the device is being loaded from stays in host memory"
        entry = next((entry for entry in held.entries if entry.site == site), None)
        if entry is None:
            return None
        outputs, inputs = self._spec.module_shape(MODULES[site % len(MODULES)])
        a = held.flat[entry.a_start : entry.a_start + entry.rank * inputs].view(entry.rank, inputs)
        b = held.flat[entry.b_start : entry.b_start + outputs * entry.rank].view(outputs, entry.rank)
        return Factors(a, b, entry.scale)

    def check(self) -> None:
        """Every element, slot and reference is accounted for."""
        self.space.check()
        residents = [(held, held.resident) for held in self._held.values() if held.resident is not None]
        slots = [resident.slot for _, resident in residents]
        assert sorted([*slots, *self._free_slots]) == list(range(1, self.pages.table.shape[0])), "slots"
        assert self.space.used == sum(_elements(held) for held, _ in residents), "elements"
        assert self._at == {resident.slot: held for held, resident in residents}, "who is where"
        in_memory = [held for held in self._held.values() if held.flat is not None or held.reading is not None]
        assert self._host.used == sum(held.nbytes for held in in_memory), "host bytes"
        assert not self._host.budget or self._host.used <= self._host.budget, "over the host's budget"
        taken = sorted(
            (start, start + size(entry))
            for held, resident in residents
            for entry, start in zip(held.entries, resident.starts, strict=True)
        )
        assert all(a[1] <= b[0] for a, b in pairwise(taken)), "extents overlap"
        table_ranks = self.pages.table[:, :, 2]
        for slot in (0, *self._free_slots):
            assert not table_ranks[slot].any(), f"free slot {slot} is not empty"
        for name, identity in self._identity_of.items():
            assert name in self._held[identity].names, f"name {name}"
        assert all(held.kept <= held.names for held in self._held.values()), "kept for a name that is gone"
        for identity, held in self._held.items():
            assert held.names or held.references or held.pins, f"{identity} is held for nobody"

    def _bind(self, name: str, adapter: Adapter, instead_of: Held | None, keep: bool) -> str:
        held = self._held.get(adapter.identity)
        more_names = name not in self._identity_of
        if (held is None and len(self._held) >= self.max_held) or len(self._identity_of) + more_names > self.max_held:
            raise AdapterError(
                f"{self.max_held} adapters are loaded, the most allowed; unload one or raise --max-cpu-loras"
            )
        going = instead_of if instead_of is not None and instead_of.names == {name} else None
        if keep:
            self._check_kept(name, adapter, going)
        if held is None:
            self._check_room(name, adapter)
            held = Held(adapter.identity, adapter.path, adapter.entries, int(adapter.flat.nbytes))
            self._held[adapter.identity] = held
            self._host.keep(held, adapter.flat, self._clock)
            if self.mode == CACHED and not self._load_now(held, adapter.flat, instead_of):
                self._host.drop(self._held.pop(adapter.identity))
                raise AdapterError(
                    f"adapter {name!r} does not fit on the device beside {len(self._at)} others, which adapter mode "
                    "cached keeps there; raise --max-loras or --adapter-memory-gib, or choose another --adapter-mode"
                )
        elif held.failed is not None or held.flat is None:
            held.failed, held.path = None, adapter.path
            self._host.keep(held, adapter.flat, self._clock)
        held.names.add(name)
        self._identity_of[name] = adapter.identity
        if instead_of is not None:
            instead_of.kept.discard(name)
        self._keep(name, held, keep)
        return adapter.identity

    def _keep(self, name: str, held: Held, keep: bool) -> None:
        """Let this name keep the adapter on the device from when it is there, or no longer."""
        if keep:
            held.kept.add(name)
            self.want(held.identity)
        else:
            held.kept.discard(name)

    def _kept_by_others(self, name: str) -> list[Held]:
        """Who stays on the device and bounds what fits beside; in mode cached everyone does."""
        return [] if self.mode == CACHED else [held for held in self._held.values() if held.kept - {name}]

    def _check_kept(self, name: str, adapter: Adapter, going: Held | None) -> None:
        """Beside what is kept there must be a place for any other adapter, or those would never be served."""
        if self.mode == CACHED:
            return
        itself, places = self._held.get(adapter.identity), self.pages.table.shape[0] - 1
        kept = [held for held in self._kept_by_others(name) if held is not itself]
        if len(kept) + 1 >= places:
            raise AdapterError(
                f"adapter {name!r} cannot be pinned: {len(kept)} of {places} places are, and one must stay free for "
                "the others; unload one, or raise --max-loras"
            )
        others = [_elements(held) for held in self._held.values() if held not in (*kept, going, itself)]
        if sum(map(_elements, kept)) + adapter.flat.numel() + max(others, default=0) > self.floor:
            raise AdapterError(
                f"adapter {name!r} cannot be pinned: with the {len(kept)} that are, it would leave too few bytes for "
                "the others; unload one, or raise --adapter-memory-gib"
            )

    def _check_room(self, name: str, adapter: Adapter) -> None:
        need, budget = int(adapter.flat.nbytes), self._host.budget
        kept = sum(map(_elements, self._kept_by_others(name)))
        if adapter.flat.numel() > self.floor - kept:
            beside = f" beside {kept * self.pages.pool.element_size()} that are pinned" if kept else ""
            raise AdapterError(
                f"adapter {name!r} needs {need} bytes of the {self.floor_bytes} for adapters{beside}; "
                "raise --adapter-memory-gib"
            )
        if budget and need > budget:
            raise AdapterError(
                f"adapter {name!r} needs {need} bytes of the {budget} for adapters in host memory; "
                "raise --max-cpu-adapter-gib"
            )

    def _load_now(self, held: Held, flat: torch.Tensor, instead_of: Held | None) -> bool:
        """To the device at once, if there is room, or will be without what it replaces."""
        going = instead_of is not None and not instead_of.references and len(instead_of.names) == 1
        if not self._make_room(held, [instead_of] if instead_of is not None and going else []):
            return False
        self._upload(held, flat)
        return True

    def _unname(self, name: str, identity: str) -> None:
        self._held[identity].names.discard(name)
        self._held[identity].kept.discard(name)
        self._drop_if_unused(identity)

    def _drop_if_unused(self, identity: str) -> None:
        held = self._held[identity]
        if not held.names and not held.references and not held.pins:
            self._evict(held)
            self._host.drop(held)
            del self._held[identity]

    def _idle(self) -> list[Held]:
        """Who may leave the device, the least valuable first; in mode cached nobody."""
        if self.mode == CACHED:
            return []
        return sorted(filter(self._evictable, self._at.values()), key=lambda held: (held.value, held.last_used))

    def _make_room(self, held: Held, idle: list[Held]) -> bool:
        """Free a slot and elements by evicting some of these; False when all else is in use."""
        sizes = [size(entry) for entry in held.entries]
        ways = [] if self._lender is None else [False, True]  # KV blocks that are free; later, cached prefixes
        while True:
            starts = self.space.take(sizes) if self._free_slots else None
            if starts is not None:
                held.resident = Resident(self._free_slots.pop(), starts, self._clock)
                self._at[held.resident.slot] = held
                return True
            if self._free_slots and ways and not (ways[0] and idle):
                self._borrow(sum(sizes), ways.pop(0))
                continue
            if not idle:
                return False
            self._aging = max(self._aging, idle[0].value)
            idle[0].counts.evictions += 1
            self._evict(idle.pop(0))

    def _borrow(self, elements: int, cached: bool) -> None:
        assert self._lender is not None
        for block in self._lender.lend(-(-elements // self._unit), cached):
            self.space.grant(block * self._unit, self._unit)

    def _evictable(self, held: Held) -> bool:
        """Not while pinned; nor, for a while, when it was loaded for a request that has not come to run yet: two
        adapters that are wanted at the same time would else push each other out for ever."""
        resident = held.resident
        if resident is None or held.pins or held.kept:
            return False
        if held.references and _failure(held) is None and not self._may_start(resident):
            resident.loaded = self._clock
        return resident.used or not held.references or self._clock - resident.loaded > GRACE

    def _touch(self, held: Held) -> None:
        self._clock += 1
        held.last_used = self._clock
        held.value = self._aging + held.popularity * held.reload_cost

    def _evict(self, held: Held) -> None:
        resident, held.resident, held.popularity, held.asked = held.resident, None, 0, None
        if resident is None:
            return
        if resident.arrival is not None:
            resident.arrival.end()
        for entry, start in zip(held.entries, resident.starts, strict=True):
            self.space.give(start, size(entry))
        del self._at[resident.slot]
        clear(self.pages, resident.slot)
        self._free_slots.append(resident.slot)

    def _upload(self, held: Held, flat: torch.Tensor | None = None) -> None:
        """Copy to the device: by the loader, or at once."""
        resident, flat = held.resident, held.flat if flat is None else flat
        assert resident is not None
        assert flat is not None
        held.counts.loads += 1
        held.asked = self._now()
        moves = copies(self.pages.pool, held.entries, resident.starts, flat, self._num_groups, self._layers_per_group)
        if self._loader is not None:
            resident.arrival = self._loader.start(moves, self._now)
        else:
            for target, source in (move for group in moves for move in group):
                target.copy_(source)
            held.counts.seconds = self._now() - held.asked
        self._show(held, resident, 0 if self.mode == CPU_ASSIST else self._num_groups)

    def _show(self, held: Held, resident: Resident, groups: int) -> None:
        resident.shown = groups
        show(self.pages, resident.slot, held.entries, resident.starts, groups * self._layers_per_group)


def _failure(held: Held) -> Exception | None:
    arrival = held.resident.arrival if held.resident is not None else None
    return held.failed if arrival is None or arrival.error is None else RuntimeError(arrival.error)


def _elements(held: Held) -> int:
    return sum(size(entry) for entry in held.entries)
