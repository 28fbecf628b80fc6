"""AdapterStore: all adapters that an engine can serve. It fulfils the engine's AdapterDirectory; the runner asks it for
slots; loading and unloading while serving come through `add`, `replace` and `remove`, on the engine's thread (reading
files, which takes long, is `peft.read_adapter` and may run elsewhere).

An identity lives as long as a name or a request refers to it: a replaced or removed adapter serves the requests it
has, on its old weights, and goes with the last of them. The parts: `registry` (names), `residency` (tiers), `device`
and `host` (memory), `eviction` (the rule).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from inlaid.adapters.adapter import Adapter, AdapterError, site_path
from inlaid.adapters.device import DeviceMemory, Mirror
from inlaid.adapters.eviction import Eviction
from inlaid.adapters.held import Counts, Held
from inlaid.adapters.host import HostMemory, Read
from inlaid.adapters.loader import AnyLoader
from inlaid.adapters.modes import CACHED, MODES, ON_DEMAND
from inlaid.adapters.pages import Lender, PagePool
from inlaid.adapters.registry import Registry
from inlaid.adapters.residency import Residency
from inlaid.kernels.backend import MODULES, AdapterPages
from inlaid.kernels.vocabulary import VocabularyChange
from inlaid.model.spec import ModelSpec


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
        mirror: Mirror | None = None,
    ) -> None:
        """Make an empty store; with `shared`, `move_into` gives it memory, of which `pool_elements` are its own. A
        `mirror` does on other devices what is done on this one."""
        on_gpu = device.type == "cuda"
        assert mode in (CACHED, ON_DEMAND) or loader is not None or on_gpu, f"{mode} needs a loader"
        assert read is not None or not host_budget, "what leaves host memory must be read again"
        self._registry = Registry(max_held)
        self._device = DeviceMemory(
            spec, max_resident, pool_elements, device, dtype, mode, loader, clock, shared=shared, mirror=mirror
        )
        self._host = HostMemory(self._registry.held, host_budget, read, pin=on_gpu)
        self._residency = Residency(self._device, self._host, Eviction(), max_seconds, clock)

    @property
    def mode(self) -> str:
        return self._device.mode

    @property
    def groups_to_start(self) -> int:
        """Layer groups of an adapter that must have landed before a request may start."""
        return self._device.groups_to_start

    def switch(self, mode: str) -> None:
        """Work on as if it had been made with another mode, which measurements compare on one engine."""
        assert mode in MODES, mode
        self._device.mode = mode

    # Names

    def add(self, name: str, adapter: Adapter, keep: bool = False) -> str:
        """Serve an adapter under a new name; returns its identity. With `keep` it stays on the device."""
        if self._registry.find(name) is not None:
            raise AdapterError(f"adapter {name!r} is already loaded; unload it first, or load it in place")
        return self._bind(name, adapter, None, keep)

    def replace(self, name: str, adapter: Adapter, keep: bool | None = None) -> str:
        """Let a name stand for other weights from the next request on (or for the first time). `keep` None: as now."""
        old = self._registry.find(name)
        keep = (old is not None and name in old.kept) if keep is None else keep
        if old is None or old.identity != adapter.identity:
            return self._bind(name, adapter, old, keep)
        if keep:
            self._check_kept(name, adapter, None)
        self._keep(name, old, keep)
        return old.identity

    def pin_name(self, name: str, keep: bool) -> None:
        """Let a name keep its adapter on the device, or no longer."""
        held = self._registry.named(name)
        if keep and not held.kept:
            self._check_pins(name, held, held.num_elements, None)
        self._keep(name, held, keep)

    def remove(self, name: str) -> int:
        """Forget a name at once. Returns how many requests still run on it; its memory goes with the last."""
        held = self._registry.unbind(name)
        in_flight = held.references
        self._drop_if_idle(held)
        return in_flight

    def names(self) -> list[str]:
        return self._registry.names()

    def identity(self, name: str) -> str | None:
        return self._registry.identity(name)

    def path(self, name: str) -> str:
        return self._registry.named(name).path

    def kept(self, name: str) -> bool:
        """Say whether a name keeps its adapter on the device."""
        return name in self._registry.named(name).kept

    # AdapterDirectory

    def resolve(self, name: str) -> str:
        held = self._registry.named(name)
        held.references += 1
        self._residency.retry(held)
        return held.identity

    def release(self, identity: str) -> None:
        held = self._held(identity)
        assert held.references > 0, "released more often than resolved"
        held.references -= 1
        self._drop_if_idle(held)

    def ready(self, identity: str) -> bool:
        held = self._registry.held.get(identity)
        if held is None:
            raise RuntimeError("it is no longer loaded")
        return self._residency.ready(held)

    def want(self, identity: str) -> None:
        self._residency.want(self._held(identity))

    def pin(self, identity: str) -> None:
        self._residency.pin(self._held(identity))

    def unpin(self, identity: str) -> None:
        held = self._held(identity)
        assert held.pins > 0, "unpinned more often than pinned"
        held.pins -= 1
        self._drop_if_idle(held)

    def rank(self, identity: str) -> int:
        return self._held(identity).rank

    def load_seconds(self, identity: str) -> tuple[float, float]:
        counts = self.counts(identity)
        return counts.fetch_seconds, counts.seconds

    # One adapter

    def sites(self, identity: str) -> tuple[int, ...]:
        """Return the sites that it adapts."""
        return tuple(entry.site for entry in self._held(identity).entries)

    def parts(self, identity: str) -> dict[str, dict[str, Any]]:
        """Return what it changes: for each module, of all that the base has, its layers, ranks and scales."""
        found: dict[str, dict[str, Any]] = {module: {"layers": [], "ranks": [], "scales": []} for module in MODULES}
        for entry in self._held(identity).entries:
            if entry.site < 0:
                name = site_path(entry.site).removeprefix("model.")
                found[name] = {"layers": [], "ranks": [entry.rank or entry.num_rows], "scales": [entry.scale or 1.0]}
                continue
            part = found[MODULES[entry.site % len(MODULES)]]
            part["layers"].append(entry.site // len(MODULES))
            part["ranks"].append(entry.rank)
            part["scales"].append(entry.scale)
        return found

    def fits_one_base(self, identity: str) -> bool:
        """Tell whether it was computed for the weights of one base, as DoRA's scales are."""
        return any(entry.fits_one_base for entry in self._held(identity).entries)

    def nbytes(self, identity: str) -> int:
        """Return the bytes of its weights, on the host as on the device."""
        return self._held(identity).nbytes

    def counts(self, identity: str) -> Counts:
        held = self._held(identity)
        if held.resident is not None and held.resident.arrival is not None:
            held.counts.seconds = held.resident.arrival.seconds
        return held.counts

    def tier(self, identity: str) -> str:
        """Name the fastest tier that holds all of it: "device", "host" or "disk"."""
        return self._residency.tier(self._held(identity))

    def on_device(self) -> list[str]:
        """List the identities of the adapters that are on the device."""
        return [held.identity for held in self._device.held]

    def on_host(self, identity: str) -> bool:
        """Say whether host memory holds it, be it on the device or not."""
        return self._held(identity).flat is not None

    def in_host_memory(self) -> list[Adapter]:
        """List the adapters whose weights host memory holds and that a name stands for."""
        held = [each for each in self._registry.held.values() if each.names and each.path]
        return [Adapter(each.identity, each.path, each.flat, each.entries) for each in held if each.flat is not None]

    def leaving(self, identity: str) -> int:
        """Count the requests that still run on weights which no name stands for any more; 0: their memory is free."""
        held = self._registry.held.get(identity)
        return 0 if held is None or held.names else max(held.references, held.pins)

    def references(self, identity: str) -> int:
        """Count the requests that hold it now."""
        return self._held(identity).references

    # Memory

    @property
    def pages(self) -> AdapterPages:
        return self._device.pages

    @property
    def space(self) -> PagePool:
        return self._device.space

    @property
    def floor(self) -> int:
        """Elements of the pool that adapters always have."""
        return self._device.floor

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

    def slot(self, identity: str | None) -> int:
        """Return the row in the device tables of a scheduled request's adapter."""
        if identity is None:
            return 0
        resident = self._held(identity).resident
        assert resident is not None, f"adapter {identity[:12]} was scheduled but is not on the device"
        return resident.slot

    def vocabulary(self, slots: Iterable[int]) -> list[VocabularyChange]:
        """List the changes of the embedding and the head by the adapters in these slots."""
        return [change for slot in sorted(set(slots)) if slot and (change := self._device.vocabulary(slot))]

    def resident(self) -> list[str]:
        """Return the identities on the device."""
        return [identity for identity, held in self._registry.held.items() if held.resident is not None]

    def move_into(self, memory: torch.Tensor, unit: int, first: int, lender: Lender) -> None:
        """Share memory with the KV cache, block by block: blocks 1 to `first` - 1 are its own, others it may borrow."""
        self._device.move_into(memory, unit, first, lender)

    def give_back(self, count: int, keep: str | None) -> list[int]:
        """Return up to `count` borrowed blocks, at the cost of idle adapters other than `keep`."""
        return self._residency.give_back(count, keep)

    # Arrivals: what the forward asks while adapters are still coming

    def landed(self, slot: int, layer: int) -> bool:
        return self._device.landed(slot, layer)

    def all_landed(self, slot: int) -> bool:
        return self._device.all_landed(slot)

    def num_bytes(self, slot: int) -> int:
        return self._device.num_bytes(slot)

    def wait(self, slot: int, layer: int) -> None:
        self._device.wait(slot, layer, self._residency.max_seconds)

    def check(self) -> None:
        """Assert that every element, slot, byte and reference is accounted for."""
        self._registry.check()
        self._device.check()
        self._host.check()

    # Binding a name

    def _held(self, identity: str) -> Held:
        return self._registry.held[identity]

    def _drop_if_idle(self, held: Held) -> None:
        if held.is_idle:
            self._residency.drop(held)
            del self._registry.held[held.identity]

    def _bind(self, name: str, adapter: Adapter, instead_of: Held | None, keep: bool) -> str:
        self._registry.check_room(name, adapter.identity)
        going = instead_of if instead_of is not None and instead_of.names == {name} else None
        if keep:
            self._check_kept(name, adapter, going)
        held = self._registry.held.get(adapter.identity)
        if held is None:
            held = self._held_anew(name, adapter, going)
        elif held.failed is not None or held.flat is None:
            held.failed, held.path = None, adapter.path
            self._residency.take(held, adapter.flat)
        before = self._registry.bind(name, held)
        self._keep(name, held, keep)
        if before is not None:
            self._drop_if_idle(before)
        return adapter.identity

    def _held_anew(self, name: str, adapter: Adapter, going: Held | None) -> Held:
        """Hold an adapter that was not known; in mode cached it must fit on the device now."""
        self._check_fits(name, adapter)
        held = Held(adapter.identity, adapter.path, adapter.entries, int(adapter.flat.nbytes))
        self._registry.held[adapter.identity] = held
        self._residency.take(held, adapter.flat)
        replaced = going if going is not None and not going.references else None
        if self.mode == CACHED:
            fits = self._residency.load_now(held, adapter.flat, replaced)
            if not fits or held.failed is not None:
                self._host.drop(self._registry.held.pop(adapter.identity))
                if held.failed is not None:
                    raise AdapterError(f"adapter {name!r}: {held.failed}")
                raise AdapterError(
                    f"adapter {name!r} does not fit on the device beside {len(self._device.held)} others, which "
                    "adapter mode cached keeps there; raise --max-loras or --adapter-memory-gib, or choose another "
                    "--adapter-mode"
                )
        return held

    def _keep(self, name: str, held: Held, keep: bool) -> None:
        """Let this name keep the adapter on the device from when it is there, or no longer."""
        if keep:
            held.kept.add(name)
            self._residency.want(held)
        else:
            held.kept.discard(name)

    def _kept_by_others(self, name: str) -> list[Held]:
        """Return the adapters that other names keep on the device; in mode cached all stay, and none is counted."""
        return [] if self.mode == CACHED else [held for held in self._registry.held.values() if held.kept - {name}]

    def _check_kept(self, name: str, adapter: Adapter, going: Held | None) -> None:
        self._check_pins(name, self._registry.held.get(adapter.identity), adapter.num_elements, going)

    def _check_pins(self, name: str, itself: Held | None, num_elements: int, going: Held | None) -> None:
        """Refuse to keep so many that some other adapter would never find a place."""
        if self.mode == CACHED:
            return
        places = self._device.slots
        kept = [held for held in self._kept_by_others(name) if held is not itself]
        if len(kept) + 1 >= places:
            raise AdapterError(
                f"adapter {name!r} cannot be pinned: {len(kept)} of {places} places are, and one must stay free for "
                "the others; unload one, or raise --max-loras"
            )
        others = [held.num_elements for held in self._registry.held.values() if held not in (*kept, going, itself)]
        if sum(held.num_elements for held in kept) + num_elements + max(others, default=0) > self.floor:
            raise AdapterError(
                f"adapter {name!r} cannot be pinned: with the {len(kept)} that are, it would leave too few bytes for "
                "the others; unload one, or raise --adapter-memory-gib"
            )

    def _check_fits(self, name: str, adapter: Adapter) -> None:
        """Refuse an adapter that is larger than all the memory that it could ever have."""
        need, budget = adapter.num_elements * self.pages.pool.element_size(), self._host.budget
        kept = sum(held.num_elements for held in self._kept_by_others(name))
        if adapter.num_elements > self.floor - kept:
            beside = f" beside {kept * self.pages.pool.element_size()} that are pinned" if kept else ""
            raise AdapterError(
                f"adapter {name!r} needs {need} bytes of the {self.floor_bytes} for adapters{beside}; "
                "raise --adapter-memory-gib"
            )
        if budget and adapter.flat.nbytes > budget:
            raise AdapterError(
                f"adapter {name!r} needs {adapter.flat.nbytes} bytes of the {budget} for adapters in host memory; "
                "raise --max-cpu-adapter-gib"
            )
