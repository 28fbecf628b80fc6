"""Adapters on a virtual clock: places for a number of them, loads that follow each other on one link layer group by
layer group, and each of the four modes: when a request may start, and how long a step takes that needs adapters which
are still coming. The modes and the rule of eviction are the store's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from inlaid.adapters.eviction import Claim, Eviction, in_order
from inlaid.adapters.modes import CACHED, CPU_ASSIST, NUM_GROUPS, ON_DEMAND, PIPELINED, SIMULATED, groups_to_start
from inlaid.engine.request import Batch
from inlaid.sim.cost import CostModel


@dataclass(frozen=True)
class Coming:
    """A load: from when the link brings it to when all of it is there."""

    begin: float
    end: float

    def landed(self, groups: int) -> float:
        """Return when so many layer groups are there."""
        return self.begin + (self.end - self.begin) * groups / NUM_GROUPS if groups else 0.0


_ALWAYS_THERE = Coming(0.0, 0.0)


@dataclass(eq=False, kw_only=True)
class SimAdapter(Claim):
    """One adapter: its load, while it has a place on the device."""

    name: str
    rank: int
    coming: Coming | None = None


class SimAdapters:
    """Places for `slots` adapters; the engine's AdapterDirectory for a simulated device."""

    def __init__(
        self,
        cost: CostModel,
        clock: Callable[[], float],
        *,
        slots: int,
        ranks: Mapping[str, int],
        resident: Sequence[str] = (),
        mode: str = ON_DEMAND,
    ) -> None:
        if mode not in SIMULATED:
            raise ValueError(f"unknown adapter mode {mode!r}; known: {', '.join(SIMULATED)}")
        self._cost = cost
        self._clock = clock
        self._slots = slots
        self._ranks = ranks
        self._mode = mode
        self._groups_to_start = groups_to_start(mode, NUM_GROUPS)
        self._eviction = Eviction()
        self._adapters: dict[str, SimAdapter] = {}
        self._resident: dict[str, SimAdapter] = {}  # those with a place
        self._link_free = 0.0
        self.num_loads = 0
        self._has_begun = False  # a load, since next_ready was last asked
        for name in resident:
            self._settle(name)

    @property
    def resident(self) -> Collection[str]:
        """Adapters that have a place on the device."""
        return self._resident.keys()

    def resolve(self, name: str) -> str:
        adapter = self._adapter(name)
        adapter.references += 1
        if self._mode == CACHED and adapter.coming is None:
            self._settle(name)
        return name

    def release(self, identity: str) -> None:
        self._adapters[identity].references -= 1

    def ready(self, identity: str) -> bool:
        coming = self._adapter(identity).coming
        return coming is not None and self._start(coming) <= self._clock()

    def want(self, identity: str) -> None:
        adapter = self._adapter(identity)
        self._touch(adapter)
        if adapter.coming is not None or not self._make_room():
            return
        begin = max(self._link_free, self._clock())
        self._link_free = begin + self._cost.load_seconds(adapter.rank)
        self._place(identity, Coming(begin, self._link_free))
        self.num_loads += 1
        self._has_begun = True

    def pin(self, identity: str) -> None:
        adapter = self._adapters[identity]
        adapter.pins += 1
        if adapter.coming is not None:
            adapter.popularity += 1
            adapter.was_used = True
        self._touch(adapter)

    def unpin(self, identity: str) -> None:
        self._adapters[identity].pins -= 1

    def rank(self, identity: str) -> int:
        return self._ranks.get(identity, 16)

    def load_seconds(self, identity: str) -> tuple[float, float]:
        return 0.0, self._cost.load_seconds(self.rank(identity))

    def next_ready(self) -> float:
        """Return when the next request may start for which something is on its way."""
        now = self._clock()
        if self._mode == CPU_ASSIST and self._has_begun:
            self._has_begun = False
            return now
        starts = (self._start(a.coming) for a in self._resident.values() if a.coming is not None)
        return min((when for when in starts if when > now), default=float("inf"))

    def step_seconds(self, batch: Batch, compute: float, start: float) -> float:
        """Return how long a step takes that starts then and whose computing alone takes `compute` seconds."""
        late: dict[str, Coming] = {}
        for work in batch.works:
            adapter = self._resident.get(work.request.adapter or "")
            if adapter is not None and adapter.coming is not None and adapter.coming.end > start:
                late[work.request.adapter or ""] = adapter.coming
        if not late:
            return compute
        if all(work.is_decode for work in batch.works):
            return max(coming.end for coming in late.values()) - start + compute
        at = start
        for groups in range(1, NUM_GROUPS + 1):
            missing = {name for name, coming in late.items() if coming.landed(groups) > at}
            if self._mode == PIPELINED:
                at = max([at, *(late[name].landed(groups) for name in missing)])
            else:
                at += self._assist_seconds(batch, missing) / NUM_GROUPS
            at += compute / NUM_GROUPS
        return at - start

    def _assist_seconds(self, batch: Batch, missing: set[str]) -> float:
        """Return the seconds of the CPU's part of a step, for these adapters in all layers."""
        rows = ((work.request.adapter or "", work.num_tokens) for work in batch.works)
        return self._cost.assist * sum(self.rank(name) * tokens for name, tokens in rows if name in missing)

    def _adapter(self, name: str) -> SimAdapter:
        if name not in self._adapters:
            self._adapters[name] = SimAdapter(name=name, rank=self.rank(name))
        return self._adapters[name]

    def _settle(self, name: str) -> None:
        """Let an adapter be on the device from the start."""
        self._adapter(name)
        self._place(name, _ALWAYS_THERE)

    def _place(self, name: str, coming: Coming) -> None:
        adapter = self._adapters[name]
        adapter.coming = coming
        self._resident[name] = adapter
        self._eviction.arrive(adapter)

    def _touch(self, adapter: SimAdapter) -> None:
        self._eviction.touch(adapter, self._cost.load_seconds(adapter.rank) / adapter.rank)

    def _start(self, coming: Coming) -> float:
        """Return when a request may start that needs this load."""
        return coming.landed(self._groups_to_start)

    def _make_room(self) -> bool:
        """Have a free place, by evicting an adapter if there is none; False when all others are in use."""
        if len(self._resident) < self._slots:
            return True
        leaving = in_order(filter(self._may_leave, self._resident.values()))
        if not leaving:
            return False
        self._eviction.evict(leaving[0])
        leaving[0].coming, leaving[0].popularity = None, 0
        del self._resident[leaving[0].name]
        return True

    def _may_leave(self, adapter: SimAdapter) -> bool:
        if self._mode == CACHED or adapter.coming is None:
            return False
        return self._eviction.may_leave(adapter, is_coming=self._start(adapter.coming) > self._clock())
