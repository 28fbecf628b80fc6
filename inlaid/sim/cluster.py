"""Many replicas on a virtual clock: each is the real engine on a simulated device, and the placement is the one that
`inlaid cluster` runs. What a replica's step has done is known to the placement when the step is over.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from inlaid.cluster.placement import Placement
from inlaid.cluster.planner import Demand
from inlaid.cluster.shares import Shares
from inlaid.cluster.view import Ask, ReplicaView
from inlaid.engine.cost import LinearCost
from inlaid.engine.engine import Engine
from inlaid.engine.remote import RemoteCharges
from inlaid.engine.request import NewRequest, Output
from inlaid.sim.adapters import SimAdapters
from inlaid.sim.request_log import Arrival, RequestLog, RequestRecord
from inlaid.sim.simulate import Clock, Setup, make_engine

ASK_AGAIN = 0.05  # seconds until a placement that named no replica is asked again
_PRICES = LinearCost()


class SimReplica:
    """One simulated engine and its front's view of it."""

    def __init__(self, name: str, setup: Setup, seats: int) -> None:
        self.clock = Clock()
        self.engine: Engine
        self.adapters: SimAdapters
        self.engine, self.runner, self.adapters = make_engine(setup, self.clock)
        self.remote = RemoteCharges(self.engine.scheduler.ledger)
        self.view = ReplicaView(name, seats, setup.slots)
        self.active = False  # a step of it is among the events
        self._pace = 1.0

    def set_pace(self, factor: float) -> None:
        """Let steps take `factor` times as long from now on."""
        self._pace = factor

    def step(self, now: float) -> tuple[float, list[Output]]:
        """Make a step, and return when it is over and what it brings."""
        self.clock.now = began = max(self.clock.now, now)
        outputs = self.engine.step()
        self.clock.now += (self._pace - 1.0) * (self.clock.now - began)
        if self.engine.idle and not outputs:
            self.clock.now = max(self.clock.now + 1e-6, min(self.adapters.next_ready(), self.clock.now + 0.1))
        return self.clock.now, outputs


@dataclass
class ClusterOutcome:
    """Results of a simulation of several replicas."""

    records: list[RequestRecord]
    end: float
    loads: int
    replica_seconds: float
    service: list[dict[str, float]] = field(default_factory=list)  # by replica and tenant
    series: list[tuple[float, int, int]] = field(default_factory=list)  # seconds, replicas wanted, replicas there


class ClusterSim:
    """The replicas, the placement and the events."""

    def __init__(
        self,
        trace: Sequence[Arrival],
        setup: Setup,
        placement: Placement,
        num_replicas: int,
        *,
        share_service: bool = True,
        until: float = float("inf"),
    ) -> None:
        self.seats = int(setup.scheduler.get("max_num_seqs", 256))
        self.setup = replace(setup, scheduler={**setup.scheduler, "max_num_seqs": self.seats})
        self.placement = placement
        self.log = RequestLog()
        self.replicas: dict[str, SimReplica] = {}
        self.closed: list[SimReplica] = []
        self.now = 0.0
        self._trace = trace
        self._share_service = share_service
        self._until = until
        self._shares = Shares()
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.demand = Demand()
        self._held: dict[str, int] = {}
        self._asks: dict[str, tuple[NewRequest, str]] = {}
        for _ in range(num_replicas):
            self.add_replica()

    def add_replica(self) -> SimReplica:
        """Start one more replica; it serves at once."""
        name = f"replica-{len(self.replicas) + len(self.closed)}"
        made = self.replicas[name] = SimReplica(name, self.setup, self.seats)
        made.clock.now = self.now
        return made

    @property
    def held_tokens(self) -> int:
        """Prompt tokens of requests that no replica has been given yet."""
        return sum(self._held.values())

    def at(self, when: float, do: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._events, (when, next(self._numbers), do))

    def run(self) -> ClusterOutcome:
        """Serve the trace, whole or until a time."""
        for arrival in self._trace:
            self.at(arrival.time, lambda arrival=arrival: self._arrive(arrival))  # type: ignore[misc]
        while self._events and self.now < self._until:
            self.now, _, do = heapq.heappop(self._events)
            do()
        replicas = [*self.closed, *self.replicas.values()]
        return ClusterOutcome(
            records=self.log.records,
            end=self.now,
            loads=sum(each.adapters.num_loads for each in replicas),
            replica_seconds=self.now * len(self.replicas),
            service=[
                {account.tenant: account.service for account in each.engine.scheduler.ledger.accounts.values()}
                for each in replicas
            ],
        )

    def ask(self, request: NewRequest) -> Ask:
        """Describe a request to the placement; how long its answer will be is not known."""
        rank = 0 if request.adapter is None else self.setup.ranks.get(request.adapter, 16)
        return Ask(request.id, request.adapter, rank, len(request.prompt), self.demand.answer)

    def _arrive(self, arrival: Arrival) -> None:
        self.demand.count(len(arrival.request.prompt))
        self._place(arrival)

    def _place(self, arrival: Arrival) -> None:
        views = [each.view for each in self.replicas.values() if each.view.is_open]
        ask = self.ask(arrival.request)
        name = self.placement.choose(ask, views, self.now) if views else None
        if name is None:
            self._held[ask.id] = ask.prompt
            self.at(self.now + ASK_AGAIN, lambda: self._place(arrival))
            return
        self._held.pop(ask.id, None)
        chosen = self.replicas[name]
        chosen.clock.now = max(chosen.clock.now, self.now) if not chosen.active else chosen.clock.now
        self.log.send(chosen.engine, arrival)
        chosen.view.send(ask)
        self._asks[ask.id] = (arrival.request, name)
        if not chosen.active:
            self._begin_step(chosen)

    def _begin_step(self, chosen: SimReplica) -> None:
        chosen.active = chosen.engine.has_work
        if chosen.active:
            if self._share_service and chosen.view.num_waiting:
                chosen.remote.take("front", self._shares.elsewhere(chosen.view.name))
            end, outputs = chosen.step(self.now)
            self.at(end, lambda: self._end_step(chosen, outputs))

    def _end_step(self, chosen: SimReplica, outputs: list[Output]) -> None:
        self.log.note(outputs, self.now)
        view = chosen.view
        view.resident = frozenset(chosen.adapters.resident)
        for output in outputs:
            known = self._asks.get(output.id)
            if known is None:
                continue
            request = known[0]
            if output.queue_time is not None:
                view.begin(output.id)
                if self._share_service:
                    self._shares.note(view.name, request.tenant, _PRICES.prefill(0, len(request.prompt)))
            if output.tokens and self._share_service:
                self._shares.note(view.name, request.tenant, _PRICES.output(0, 1, len(output.tokens)))
            if output.finish_reason is not None:
                view.end(output.id)
                del self._asks[output.id]
                self.demand.learn(request.true_output_len or 0)
        if not view.is_open and not view.size:
            self.closed.append(self.replicas.pop(view.name))
            return
        self._begin_step(chosen)


def simulate_cluster(
    trace: Sequence[Arrival], setup: Setup, placement: Placement, num_replicas: int, **options: Any
) -> ClusterOutcome:
    """Serve a trace on replicas under a placement."""
    return ClusterSim(trace, setup, placement, num_replicas, **options).run()
