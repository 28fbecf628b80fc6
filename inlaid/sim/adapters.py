"""Where adapters are, on a virtual clock: room for so many, loads that follow each other on one link layer group by
layer group, and what each of the four modes makes of that: when a request may start, and how long a step takes that
needs adapters which are still coming. The rules are those of adapters/store.py and of the GPU's runner."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from inlaid.engine.request import Batch
from inlaid.sim.cost import CostModel

CACHED, ON_DEMAND, PIPELINED, CPU_ASSIST = MODES = ("cached", "on-demand", "pipelined", "cpu-assist")
GROUPS = 4  # of layers


@dataclass(frozen=True)
class Coming:
    """A load: from when the link brings it to when all of it is there."""

    begin: float
    end: float

    def landed(self, group: int) -> float:
        """When that layer group is there."""
        return self.begin + (self.end - self.begin) * (group + 1) / GROUPS


class SimAdapters:
    """Room for so many adapters, least recently used out first."""

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
        if mode not in MODES:
            raise ValueError(f"unknown adapter mode {mode!r}; known: {', '.join(MODES)}")
        self._cost = cost
        self._clock = clock
        self._slots = slots
        self._ranks = ranks
        self._mode = mode
        there = Coming(0.0, 0.0)
        self._resident: OrderedDict[str, Coming] = OrderedDict.fromkeys(resident, there)
        self._pins: dict[str, int] = {}
        self._link_free = 0.0
        self.num_loads = 0
        self._begun = False  # a load, since next_ready was last asked

    def resolve(self, name: str) -> str:
        if self._mode == CACHED and name not in self._resident:
            self._resident[name] = Coming(0.0, 0.0)
        return name

    def release(self, identity: str) -> None: ...

    def ready(self, identity: str) -> bool:
        coming = self._resident.get(identity)
        return coming is not None and self._may_start(coming) <= self._clock()

    def _may_start(self, coming: Coming) -> float:
        if self._mode == CPU_ASSIST:
            return 0.0
        return coming.landed(0) if self._mode == PIPELINED else coming.end

    def want(self, identity: str) -> None:
        if identity in self._resident:
            return
        if len(self._resident) >= self._slots:
            now = self._clock()
            idle = (n for n, coming in self._resident.items() if not self._pins.get(n) and coming.end <= now)
            victim = next(idle, None)
            if victim is None:
                return
            del self._resident[victim]
        begin = max(self._link_free, self._clock())
        self._link_free = begin + self._cost.load_seconds(self.rank(identity))
        self._resident[identity] = Coming(begin, self._link_free)
        self.num_loads += 1
        self._begun = True

    def pin(self, identity: str) -> None:
        self._pins[identity] = self._pins.get(identity, 0) + 1
        self._resident.move_to_end(identity)

    def unpin(self, identity: str) -> None:
        self._pins[identity] -= 1

    def rank(self, identity: str) -> int:
        return self._ranks.get(identity, 16)

    def next_ready(self) -> float:
        """When the next request may start for which something is on its way."""
        now = self._clock()
        if self._mode == CPU_ASSIST and self._begun:
            self._begun = False
            return now
        starts = (self._may_start(coming) for coming in self._resident.values())
        return min((when for when in starts if when > now), default=float("inf"))

    def step_seconds(self, batch: Batch, compute: float, start: float) -> float:
        """How long a step takes that starts then and whose computing alone takes so long."""
        late: dict[str, Coming] = {}
        for work in batch.works:
            coming = self._resident.get(work.request.adapter or "")
            if coming is not None and coming.end > start:
                late[work.request.adapter or ""] = coming
        if not late:
            return compute
        if all(work.is_decode for work in batch.works):
            return max(coming.end for coming in late.values()) - start + compute
        at = start
        for group in range(GROUPS):
            missing = {name for name, coming in late.items() if coming.landed(group) > at}
            if self._mode == PIPELINED:
                at = max([at, *(late[name].landed(group) for name in missing)])
            else:
                at += self._assist_seconds(batch, missing) / GROUPS
            at += compute / GROUPS
        return at - start

    def _assist_seconds(self, batch: Batch, missing: set[str]) -> float:
        """The CPU's part of a step, for these adapters in all layers."""
        rows = ((work.request.adapter or "", work.num_tokens) for work in batch.works)
        return self._cost.assist * sum(self.rank(name) * tokens for name, tokens in rows if name in missing)
