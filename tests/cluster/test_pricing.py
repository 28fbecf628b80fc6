"""Pricer: prices that follow the replicas' own steps, and what a replica that is slower than the others gets."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from inlaid.cluster.client import ClusterClient
from inlaid.cluster.command import local_replicas
from inlaid.cluster.placement import Predicted
from inlaid.cluster.pricing import Pricer, fitted
from inlaid.cluster.view import Ask, Prices
from inlaid.config import EngineConfig
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.engine.step_log import Load, Step
from inlaid.sim.cluster import ClusterSim
from inlaid.sim.cluster_sweep import OBJECTIVE, draw_trace, measure, setup_of, workload
from inlaid.sim.cost import CostModel, load_cost, prices_of
from inlaid.worker.messages import AdapterInfo
from tests.worker.fake_engine import ENVIRONMENT, FACTORY

COST = replace(load_cost("a10g"), step=0.02, floor=0.0, prompt_floor=0.0)


def steps_of(cost: CostModel, pace: float, count: int = 300, seed: int = 1) -> list[Step]:
    """Draw steps of a machine, with a tenth of noise."""
    rng = random.Random(seed)
    steps = []
    for _ in range(count):
        decodes, prompts, adapters = rng.randint(0, 40), rng.choice((0, 0, 1, 2)), rng.randint(1, 8)
        load = Load(
            prefill_tokens=prompts * rng.randint(20, 400),
            prefills=prompts,
            decodes=decodes,
            prompt_context=decodes * rng.randint(50, 300),
            adapters=adapters,
            adapter_rows=decodes + prompts,
            ranks=adapters * rng.choice((8, 16, 64)),
        )
        steps.append(Step(pace * rng.uniform(0.9, 1.1) * cost.step_seconds(load), load))
    return steps


def adapter(rank: int, read: float, copy: float) -> AdapterInfo:
    return AdapterInfo(
        name=str(rank),
        identity=str(rank),
        path="",
        rank=rank,
        bytes=1,
        tier="device",
        load_seconds=read,
        copy_seconds=copy,
    )


def test_prices_come_out_of_the_steps_and_loads_of_the_machine() -> None:
    steps = {"a": steps_of(COST, 1.0), "b": steps_of(COST, 1.0, seed=2)}
    loads = [adapter(8, 0.016, 0.004), adapter(64, 0.128, 0.032), adapter(16, 0.0, 0.0)]
    prices, paces = fitted(steps, loads, Prices())
    true = prices_of(COST)
    for rows, ranks in ((1, 8), (8, 64), (32, 200)):
        found, known = (each.step_seconds(rows, 4, ranks, 100 * rows) for each in (prices, true))
        assert found == pytest.approx(known, rel=0.1)
    assert prices.prefill_seconds(300) == pytest.approx(true.prefill_seconds(300), rel=0.1)
    assert prices.load_seconds(16) == pytest.approx(16 * 0.0005)
    assert prices.load_seconds(16, on_host=False) == pytest.approx(16 * 0.0025)
    assert paces == {"a": 1.0, "b": 1.0}


def test_too_few_steps_or_steps_without_a_pattern_change_nothing() -> None:
    before = Prices()
    assert fitted({"a": steps_of(COST, 1.0, 20)}, [], before) == (before, {})
    rng = random.Random(3)
    noise = [Step(rng.expovariate(1.0), step.load) for step in steps_of(COST, 1.0)]
    assert fitted({"a": noise}, [], before) == (before, {})


def test_a_replica_of_half_speed_is_found_and_more_requests_are_in_time() -> None:
    fast = [steps_of(COST, 1.0, seed=seed) for seed in range(2)]
    _, paces = fitted({"a": fast[0], "b": fast[1], "slow": steps_of(COST, 2.0)}, [], Prices())
    assert paces["slow"] / paces["a"] == pytest.approx(2.0, rel=0.15)
    drawn = workload(2.25, 1.0, 3, adapters=300, calm=40, high=10, after=10)
    trace, setup = draw_trace(drawn), setup_of("a10g", drawn)
    attained = {}
    for known in (False, True):
        sim = ClusterSim(trace, setup, Predicted(prices_of(setup.cost), objective=OBJECTIVE), 3)
        slow = list(sim.replicas.values())[1]
        slow.set_pace(2.0)
        slow.view.pace = 2.0 if known else 1.0
        attained[known] = measure(sim.run())["attainment"]
    assert attained[True] > 0.98 > 0.92 > attained[False]


def test_the_prices_of_a_live_cluster_are_its_own() -> None:
    async def main() -> None:
        prices = Prices()
        client = ClusterClient(
            EngineConfig(model="fake"),
            {},
            make=local_replicas(factory=FACTORY, environment=ENVIRONMENT),
            placement=Predicted(prices),
            count=1,
        )
        pricer = Pricer(prices, client.fleet, client.adapters.values)
        client.loops.append(pricer)
        await client.start()
        try:
            await pricer.fit()
            assert prices == Prices(), "nothing is known yet"
            (replica,) = client.fleet.serving
            ask = Ask("x", None, 0, 100, 50.0)
            placement = Predicted(prices)
            before = placement.seconds(replica.view, ask)
            params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0)

            async def answer(number: int) -> None:
                async for _ in client.generate(NewRequest(id=f"r{number}", prompt=[number, 7], params=params)):
                    pass

            for number in range(4):
                await asyncio.gather(*(answer(8 * number + each) for each in range(2 * number + 1)))
            told = await replica.engine.call("steps")
            assert len(told) >= 50
            expected, _ = fitted({replica.name: [Step(s["seconds"], Load(**s["load"])) for s in told]}, [], prices)
            await pricer.fit()
            assert prices == expected
            assert prices == Prices() or placement.seconds(replica.view, ask) != before
        finally:
            await client.close()

    asyncio.run(main())
