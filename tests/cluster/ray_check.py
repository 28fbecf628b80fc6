"""Run a cluster on a Ray of this machine, kill an actor in mid-stream, and wait until Serve has it back.

`test_ray.py` runs this in a process of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

from inlaid.cluster.client import ClusterClient
from inlaid.cluster.placement import LeastLoaded
from inlaid.cluster.ray_app import ray_replicas
from inlaid.cluster.view import Prices
from inlaid.config import EngineConfig
from inlaid.engine.request import NewRequest, SamplingParams
from tests.engine.fake_runner import generate
from tests.worker.fake_engine import ENVIRONMENT, FACTORY

PARAMS = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0)


async def check() -> None:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:.1f} s: {text}", flush=True)

    make = ray_replicas("local", None, 0.0, ENVIRONMENT, FACTORY)
    say("Ray runs")
    client = ClusterClient(EngineConfig(model="fake"), {}, make=make, placement=LeastLoaded(Prices()), count=2)
    await client.start()
    say("two replicas serve")
    begun = asyncio.Event()

    async def answer(number: int) -> bool:
        made: list[int] = []
        async for output in client.generate(NewRequest(id=f"r{number}", prompt=[number, 7], params=PARAMS)):
            made += output.tokens
            begun.set()
        return made == generate([number, 7], None, 60, frozenset())

    asked = [asyncio.create_task(answer(number)) for number in range(12)]
    await begun.wait()
    first = client.fleet.replicas["replica-0"]
    os.kill(await first.engine._handle.process_id.remote(), signal.SIGKILL)  # type: ignore[attr-defined]
    assert all(await asyncio.gather(*asked))
    assert client.num_moved > 0
    say(f"{client.num_moved} requests have moved from the killed actor")
    while len(client.fleet.serving) < 2:
        await asyncio.sleep(0.2)
    say(f"Serve has brought it back, {first.engine.num_restarts} restart")
    assert first.engine.num_restarts == 1
    assert all(await asyncio.gather(*(answer(number) for number in range(20, 28))))
    await client.close()
    say("closed")
    print("all as on one engine", flush=True)


if __name__ == "__main__":
    asyncio.run(check())
