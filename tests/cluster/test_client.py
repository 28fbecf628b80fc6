"""ClusterClient over real processes with a fake model: streams that move, drained and added replicas, changes on all or
none, rates counted once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from inlaid.cluster.client import ClusterClient
from inlaid.cluster.command import local_replicas
from inlaid.cluster.placement import LeastLoaded, Predicted, in_order
from inlaid.cluster.view import Ask, Prices, ReplicaView
from inlaid.config import EngineConfig, SchedulerConfig
from inlaid.engine.refusal import Refused
from inlaid.engine.request import NewRequest, Output, SamplingParams
from inlaid.worker.errors import EngineDead
from tests.engine.fake_runner import generate
from tests.worker.fake_engine import DEADLY, ENVIRONMENT, FACTORY

PARAMS = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0)


@asynccontextmanager
async def cluster(count: int, adapters: dict[str, str] | None = None, **options: Any) -> AsyncIterator[ClusterClient]:
    config = options.pop("config", EngineConfig(model="fake"))
    make = local_replicas(factory=FACTORY, environment=ENVIRONMENT)
    placement = options.pop("placement", None) or LeastLoaded(Prices())
    client = ClusterClient(config, adapters, make=make, placement=placement, count=count, **options)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def answer(client: ClusterClient, request: NewRequest, on_first: Callable[[], None] = lambda: None) -> list[int]:
    made: list[int] = []
    async with aclosing(client.generate(request)) as outputs:
        async for output in outputs:
            if not made:
                on_first()
            made += output.tokens
    return made


async def until(condition: Callable[[], bool]) -> None:
    """Look again and again; the test's own timeout ends what never comes true."""
    while not condition():
        await asyncio.sleep(0.01)


def request(number: int, prompt: list[int] | None = None, **fields: Any) -> NewRequest:
    return NewRequest(id=f"r{number}", prompt=prompt or [number, 7], params=PARAMS, **fields)


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(main())  # type: ignore[arg-type]


def test_answers_are_those_of_one_engine_while_replicas_are_killed_drained_and_added() -> None:
    async def main() -> None:
        async with cluster(2) as client:
            first, second = client.fleet.replicas.values()
            begun = asyncio.Event()
            asked = [asyncio.create_task(answer(client, request(n), begun.set)) for n in range(12)]
            await begun.wait()
            assert first.engine.process_id is not None  # type: ignore[attr-defined]
            os.kill(first.engine.process_id, signal.SIGKILL)  # type: ignore[attr-defined]
            asked += [asyncio.create_task(answer(client, request(n))) for n in range(12, 20)]
            added = await client.fleet.add()
            await until(lambda: first.state == "serving" and first.lives == 1)
            await client.drain_replica(second.name)
            assert set(client.fleet.replicas) == {first.name, added.name}
            assert await asyncio.gather(*asked) == [generate([n, 7], None, 60, ()) for n in range(20)]
            assert client.num_moved > 0
            assert await answer(client, request(99)) == generate([99, 7], None, 60, ())
            assert [each.view.size for each in client.fleet.replicas.values()] == [0, 0]
            assert client.num_requests == 0

    run(main)


def test_a_stream_goes_on_from_its_tokens_or_fails_if_told_so() -> None:
    async def main(resume: bool) -> None:
        async with cluster(2, resume=resume) as client:
            made: list[int] = []
            with nullcontext() if resume else pytest.raises(EngineDead, match="died after"):
                async with aclosing(client.generate(request(1))) as outputs:
                    async for output in outputs:
                        if not made:
                            (holder,) = [each for each in client.fleet.replicas.values() if each.view.size]
                            os.kill(holder.engine.process_id, signal.SIGKILL)  # type: ignore[attr-defined]
                        made += output.tokens
            expected = generate([1, 7], None, 60, ())
            assert made == (expected if resume else expected[: len(made)])
            assert client.num_moved == int(resume)
            if resume:
                charged = (await client.call("fairness"))["tenants"][""]
                assert charged["prompt_tokens"] == 0, "the replica that died has charged the prompt"
                assert 0 < charged["output_tokens"] < 60

    for resume in (True, False):
        asyncio.run(main(resume))


def test_a_request_that_kills_its_replicas_is_taken_for_the_cause() -> None:
    async def main() -> None:
        async with cluster(2) as client:
            with pytest.raises(EngineDead, match="3 replicas died"):
                await answer(client, request(1, DEADLY))
            await until(lambda: client.ready)
            assert await answer(client, request(2)) == generate([2, 7], None, 60, ())

    run(main)


def test_a_slow_replica_is_not_a_dead_one() -> None:
    async def main() -> None:
        async with cluster(2) as client:
            slow, other = client.fleet.replicas.values()
            outputs = client.generate(request(1))
            made = list((await anext(outputs)).tokens)
            assert slow.view.size + other.view.size == 1
            holder = slow if slow.view.size else other
            os.kill(holder.engine.process_id, signal.SIGSTOP)  # type: ignore[attr-defined]
            await until(lambda: holder.view.silent > 0)
            assert await answer(client, request(2)) == generate([2, 7], None, 60, ())
            os.kill(holder.engine.process_id, signal.SIGCONT)  # type: ignore[attr-defined]
            async for output in outputs:
                made += output.tokens
            assert made == generate([1, 7], None, 60, ())
            assert (client.num_moved, client.num_restarts) == (0, 0)

    run(main)


def test_a_new_replica_has_the_adapters_that_are_asked_for_before_it_opens(tmp_path: Path) -> None:
    async def main() -> None:
        names = {f"a{n}": str(tmp_path) for n in range(6)}
        async with cluster(1, names, placement=Predicted(Prices())) as client:
            shorter = SamplingParams(max_tokens=2, temperature=0.0)
            for name in names:
                await answer(client, NewRequest(id=name, prompt=[5], params=shorter, adapter=name))
            added = await client.fleet.add()
            known = {info.identity: info.name for info in client.adapters.values()}
            views = [each.view for each in client.fleet.serving]
            mine = {known[each] for each in known if in_order(each, views)[0] is added.view}
            assert (await added.engine.call("stats"))["prompt_tokens"] == len(mine)

    run(main)


def test_adapters_and_settings_change_on_all_replicas_or_on_none(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(2, {"a": str(tmp_path)}) as client:
            first, second = client.fleet.replicas.values()
            (tmp_path / "new").mkdir()
            await client.load_adapter("b", str(tmp_path / "new"))
            assert {info.name: set(info.replicas) for info in await client.list_adapters()} == {
                "a": {first.name, second.name},
                "b": {first.name, second.name},
            }
            await second.engine.load_adapter("c", str(tmp_path))  # behind the cluster's back: it refuses "c" now
            with pytest.raises(Refused, match="already loaded"):
                await client.load_adapter("c", str(tmp_path))
            assert set(first.engine.adapters) == {"a", "b"}
            await second.engine.unload_adapter("c")
            with pytest.raises(ValueError, match="unknown policy"):
                await client.set_scheduler({"policy": "no-such"})
            await client.set_scheduler({"policy": "vtc"})
            added = await client.fleet.add()
            assert set(added.engine.adapters) == {"a", "b"}
            assert (await added.engine.call("scheduler"))["policy"] == "vtc"
            await client.unload_adapter("a")
            assert [set(each.engine.adapters) for each in client.fleet.replicas.values()] == [{"b"}] * 3

    run(main)


def test_service_and_rates_are_counted_once_over_all_replicas() -> None:
    async def main() -> None:
        async with cluster(2, config=EngineConfig(model="fake", scheduler=SchedulerConfig(policy="vtc"))) as client:
            shorter = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0)
            whole = 0.0
            for number in range(4):  # of two idle replicas any gets it; two at a time go to both
                pair = [NewRequest(id=f"{number}{p}", prompt=[5], params=shorter, tenant="t") for p in (0, 1)]
                await asyncio.gather(*(answer(client, each) for each in pair))
                whole += 2 * (1 + 2 * 30)
            last = NewRequest(id="last", prompt=[5], params=shorter, tenant="t")
            await answer(client, last)
            whole += 1 + 2 * 30
            totals = [(await each.engine.call("fairness"))["tenants"]["t"] for each in client.fleet.serving]
            assert sum(total["service_total"] for total in totals) == whole
            assert max(total["counter"] for total in totals) == whole, "the last one's replica knew of all before"
            await client.set_scheduler({"limits": {"u": {"requests_per_minute": 3}}})
            for number in range(3):
                await answer(client, NewRequest(id=f"u{number}", prompt=[5], params=shorter, tenant="u"))
            with pytest.raises(Refused, match="3 requests per 60 s"):
                await answer(client, NewRequest(id="u3", prompt=[5], params=shorter, tenant="u"))
            merged = (await client.call("fairness"))["tenants"]["t"]
            assert (merged["service_total"], merged["counter"]) == (whole, whole)

    run(main)


def test_a_replica_of_another_base_is_replaced_when_it_comes_back() -> None:
    async def main() -> None:
        async with cluster(2) as client:
            first, _ = client.fleet.replicas.values()
            assert client.model is not None
            first.engine._factory = "tests.worker.fake_engine:build_other"  # type: ignore[attr-defined]
            os.kill(first.engine.process_id, signal.SIGKILL)  # type: ignore[attr-defined]
            await until(lambda: first.name not in client.fleet.replicas and len(client.fleet.serving) == 2)
            assert await answer(client, request(1)) == generate([1, 7], None, 60, ())

    run(main)


def test_a_death_that_was_not_noticed_yet_costs_a_request_one_move() -> None:
    """A connection may break before its process is known to be dead; the placement would choose the replica again."""

    class First:
        def choose(self, ask: Ask, views: Sequence[ReplicaView], now: float) -> str:
            return views[0].name

    async def gone(request: NewRequest, timeout: float = 0.0) -> AsyncIterator[Output]:
        raise EngineDead("the connection is closed")
        yield

    async def main() -> None:
        async with cluster(2, placement=First()) as client:
            first, _ = client.fleet.replicas.values()
            first.engine.generate = gone  # type: ignore[method-assign,assignment]
            assert await answer(client, request(1)) == generate([1, 7], None, 60, ())
            assert client.num_moved == 1

    run(main)
