"""Prefill and decode on replicas of their own, on a virtual clock: a prompt is computed on one replica, its KV moves to
another one over that one's link, and the answer is made there. `SplitPlanner` says how many of each kind there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from inlaid.cluster.placement import Placement
from inlaid.cluster.planner import Router, Split, SplitPlanner
from inlaid.engine.request import NewRequest, Output
from inlaid.sim.cluster import ASK_AGAIN, ClusterOutcome, ClusterSim, SimReplica
from inlaid.sim.request_log import Arrival, RequestRecord
from inlaid.sim.scaling import Machine, Scaled, Start
from inlaid.sim.simulate import Setup
from inlaid.sim.traced import WORD

PREFILL, DECODE = "prefill", "decode"


class ApartSim(ClusterSim):
    """Simulated replicas of two kinds, and the KV on its way from one to another."""

    def __init__(
        self, trace: Sequence[Arrival], setup: Setup, placement: Placement, router: Router, mock: bool
    ) -> None:
        super().__init__(trace, setup, placement, router.min_prefill_num + router.min_decode_num, share_service=False)
        self.kinds = {name: PREFILL if at < router.min_prefill_num else DECODE for at, name in enumerate(self.replicas)}
        self.moving = 0  # tokens whose KV is on its way, or waits for a link
        self._router, self._mock = router, mock
        self._links: dict[str, float] = {}  # by replica: when its link is free
        self._records: dict[str, RequestRecord] = {}

    def of_kind(self, kind: str) -> list[SimReplica]:
        """List the replicas of a kind."""
        return [each for each in self.replicas.values() if self.kinds[each.view.name] == kind]

    def run(self) -> ClusterOutcome:
        """Serve the trace."""
        outcome = super().run()
        outcome.records = sorted(self._records.values(), key=lambda record: record.arrival)
        return outcome

    def _place(self, arrival: Arrival) -> None:
        request = arrival.request
        views = [each.view for each in self.of_kind(PREFILL) if each.view.is_open]
        if not views:
            self._held[request.id] = len(request.prompt)
            self.at(self.now + ASK_AGAIN, lambda: self._place(arrival))
            return
        self._held.pop(request.id, None)
        output = request.true_output_len or request.params.max_tokens
        self._records[request.id] = RequestRecord(
            request.id, request.tenant, request.adapter, arrival.time, len(request.prompt), output
        )
        params = msgspec.structs.replace(request.params, max_tokens=1)
        only_prompt = msgspec.structs.replace(request, params=params, true_output_len=1)
        view = min(views, key=lambda view: view.waiting_tokens)
        self._send(self.replicas[view.name], only_prompt, request)

    def _send(self, chosen: SimReplica, sent: NewRequest, request: NewRequest) -> None:
        if not chosen.active:
            chosen.clock.now = max(chosen.clock.now, self.now)
        chosen.engine.add(sent)
        chosen.view.send(self.ask(request))
        self._asks[request.id] = (request, chosen.view.name)
        if not chosen.active:
            self._begin_step(chosen)

    def _end_step(self, chosen: SimReplica, outputs: list[Output]) -> None:
        view = chosen.view
        for output in outputs:
            request, record = self._asks[output.id][0], self._records[output.id]
            view.begin(output.id)
            is_first = record.first_token is None
            if is_first:
                record = self._records[output.id] = replace(record, first_token=self.now)
            if output.finish_reason is not None:
                view.end(output.id)
                if is_first and record.output_len > 1:
                    self._move(request)
                else:
                    self._records[output.id] = replace(record, finish=self.now)
                    self.demand.learn(record.output_len)
        if not view.is_open and not view.size:
            self.closed.append(self.replicas.pop(view.name))
            return
        self._begin_step(chosen)

    def _move(self, request: NewRequest) -> None:
        """Bring a prompt's KV to the replica that decodes and has the fewest requests."""
        tokens = len(request.prompt)
        open_ones = [each.view for each in self.of_kind(DECODE) if each.view.is_open]
        if not open_ones:
            self.at(self.now + ASK_AGAIN, lambda: self._move(request))
            return
        name = min(open_ones, key=lambda view: (view.size, self._links.get(view.name, 0.0))).name
        seconds = (
            self._router.mock_transfer_millis / 1e3 if self._mock else tokens / self._router.tokens_transferred_per_sec
        )
        done = self._links[name] = max(self.now, self._links.get(name, 0.0)) + seconds
        self.moving += tokens
        self.at(done, lambda: self._receive(name, request))

    def _receive(self, name: str, request: NewRequest) -> None:
        self.moving -= len(request.prompt)
        if name not in self.replicas:  # it has been drained meanwhile
            self._move(request)
            return
        chosen = self.replicas[name]
        chosen.runner.received.add(request.id)
        self._send(chosen, msgspec.structs.replace(request, made=[WORD]), request)


class ScaledApart(Scaled):
    """The loop between the planner and a simulated cluster of two kinds of replicas."""

    sim: ApartSim

    def __init__(
        self,
        trace: Sequence[Arrival],
        setup: Setup,
        placement: Placement,
        router: Router,
        start: Start,
        machine: Machine,
    ) -> None:
        self._split = SplitPlanner(router)
        super().__init__(trace, setup, placement, None, router, start, machine)

    def _make_sim(self, trace: Sequence[Arrival], setup: Setup, placement: Placement) -> ApartSim:
        return ApartSim(trace, setup, placement, self._router, self._start.mock_transfer)

    def _change(self, alive: Sequence[SimReplica]) -> int:
        by_kind = {kind: [each for each in alive if each in self.sim.of_kind(kind)] for kind in (PREFILL, DECODE)}
        load = replace(self._load(by_kind[PREFILL], by_kind[DECODE]), resident_tokens=self.sim.moving)
        split = Split(len(by_kind[PREFILL]), len(by_kind[DECODE]))
        wanted = self._split.wanted(load, split, self.sim.now)
        missing = {PREFILL: wanted.prefill - split.prefill, DECODE: wanted.decode - split.decode}
        for kind, other in ((PREFILL, DECODE), (DECODE, PREFILL)):
            spare = sorted((each for each in by_kind[other] if each.view.is_open), key=lambda each: each.view.size)
            for _ in range(missing[kind]):
                if self._start.mutate and missing[other] < 0 and len(spare) > 1:
                    self.sim.kinds[spare.pop(0).view.name] = kind
                    missing[other] += 1
                else:
                    self.sim.kinds[self._add().view.name] = kind
        for kind, count in missing.items():
            views = [
                each.view for each in by_kind[kind] if each.view.is_open and self.sim.kinds[each.view.name] == kind
            ]
            if count < 0 and len(views) > 1:
                self._drain(min(views, key=lambda view: view.size).name)
        return wanted.prefill + wanted.decode
