"""Scaler: as many replicas as the planner says, over processes with a fake model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from inlaid.cluster.client import ClusterClient
from inlaid.cluster.command import local_replicas
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
        client.scaler = Scaler(planner, client.fleet)
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
