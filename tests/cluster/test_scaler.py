"""Scaler: as many replicas as the planner says, over processes with a fake model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from inlaid.cluster.client import ClusterClient
from inlaid.cluster.command import local_replicas
from inlaid.cluster.fleet import Fleet
from inlaid.cluster.placement import LeastLoaded
from inlaid.cluster.planner import Load
from inlaid.cluster.scaler import Scaler
from inlaid.cluster.view import Prices, ReplicaView
from inlaid.config import EngineConfig
from inlaid.engine.request import NewRequest, SamplingParams
from tests.engine.fake_runner import generate
from tests.worker.fake_engine import ENVIRONMENT, FACTORY


class Told:
    """A planner that wants what it is told to, and keeps what it saw."""

    def __init__(self) -> None:
        self.number = 2
        self.loads: list[Load] = []

    def wanted(self, load: Load, views: Sequence[ReplicaView], now: float) -> int:
        self.loads.append(load)
        return self.number


def test_replicas_come_and_go_as_planned_and_no_request_is_lost() -> None:
    async def main() -> None:
        planner = Told()
        make = local_replicas(factory=FACTORY, environment=ENVIRONMENT)
        client = ClusterClient(EngineConfig(model="fake"), {}, make=make, placement=LeastLoaded(Prices()), count=1)
        client.loops.append(Scaler(planner, client.fleet, client.demand))
        params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0)

        async def answer(number: int) -> list[int]:
            new = NewRequest(id=f"r{number}", prompt=[number, 7], params=params)
            return [token async for output in client.generate(new) for token in output.tokens]

        async def until(count: int) -> None:
            while len(client.fleet.serving) != count or len(client.fleet.replicas) != count:
                await asyncio.sleep(0.01)

        await client.start()
        try:
            asked = [asyncio.create_task(answer(number)) for number in range(6)]
            await until(2)
            planner.number = 1
            asked += [asyncio.create_task(answer(number)) for number in range(6, 12)]
            await until(1)
            expected = [generate([number, 7], None, 60, frozenset()) for number in range(12)]
            assert await asyncio.gather(*asked) == expected
            assert max(load.replicas for load in planner.loads) == 2, "one that starts counts: none is added twice"
        finally:
            await client.close()

    asyncio.run(main())


class EndsSlowly:
    """An engine whose end takes a moment, as a process's does."""

    model = SimpleNamespace(base_version="v")
    num_restarts = 0
    ready = True

    def __init__(self) -> None:
        self.adapters: dict[str, Any] = {}
        self.ending, self.ended = asyncio.Event(), False

    async def start(self) -> None: ...

    async def close(self) -> None:
        self.ending.set()
        await asyncio.sleep(0.01)
        self.ended = True


def test_a_replica_that_is_being_ended_when_the_cluster_closes_is_ended() -> None:
    async def main() -> None:
        engines: list[Any] = []

        def make(*_: Any) -> Any:
            engines.append(EndsSlowly())
            return engines[-1]

        fleet = Fleet(EngineConfig(model="fake"), {}, make, give_up=lambda reason: None)
        for _ in range(2):
            await fleet.add()
        removing = asyncio.create_task(fleet.remove("replica-1", patience=1.0))
        await engines[1].ending.wait()
        removing.cancel()
        await asyncio.gather(removing, return_exceptions=True)
        await fleet.close()
        assert all(engine.ended for engine in engines)

    asyncio.run(main())
