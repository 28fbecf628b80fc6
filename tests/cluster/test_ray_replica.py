"""The two sides of a replica that Ray places, without Ray: a handle that calls the actor in this process. `test_ray.py`
does the same with Ray, which takes too long for every run."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from inlaid.cluster.client import ClusterClient
from inlaid.cluster.placement import LeastLoaded
from inlaid.cluster.ray_app import EngineActor, RayReplica
from inlaid.cluster.view import Prices
from inlaid.config import EngineConfig
from inlaid.engine.refusal import Refused
from inlaid.engine.request import NewRequest, SamplingParams
from tests.engine.fake_runner import generate
from tests.worker.fake_engine import ENVIRONMENT, FACTORY

PARAMS = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0)


class ActorDied(Exception):
    """Stands for Ray's error."""


class Stream:
    """The answer of a method that yields."""

    def __init__(self, items: AsyncIterator[bytes], handle: Handle) -> None:
        self._items, self._handle, self._actor = items, handle, handle.actor

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> bytes:
        if self._handle.actor is not self._actor:
            raise ActorDied
        return await self._items.__anext__()

    def cancel(self) -> None: ...


class Method:
    """A method of an actor, as a handle has it."""

    def __init__(self, handle: Handle, name: str, stream: bool = False) -> None:
        self._handle, self._name, self._stream = handle, name, stream

    def remote(self, *arguments: Any) -> Any:
        made = getattr(self._handle.actor, self._name)(*arguments)
        return Stream(made, self._handle) if self._stream else asyncio.ensure_future(made)


class _Methods:
    def __init__(self, handle: Handle, stream: bool) -> None:
        self._handle, self._stream = handle, stream

    def __getattr__(self, name: str) -> Method:
        return Method(self._handle, name, self._stream)


class Handle(_Methods):
    """A handle of Serve to an actor that is replaced when it dies."""

    def __init__(self) -> None:
        super().__init__(self, stream=False)
        self.actor = self.new_actor()

    def new_actor(self) -> EngineActor:
        config = msgspec.msgpack.encode(EngineConfig(model="fake"))
        return EngineActor(config, {}, 0.0, ENVIRONMENT, FACTORY)

    def options(self, stream: bool) -> _Methods:
        return _Methods(self, stream)

    async def replace(self) -> None:
        """Kill the actor with its engine, and put a new one in its place, as Serve does."""
        dead, self.actor = self.actor, self.new_actor()
        assert dead.client.process_id is not None
        os.kill(dead.client.process_id, signal.SIGKILL)
        await dead.client.close()


def test_streams_survive_an_actor_and_its_successor_serves() -> None:
    async def main() -> None:
        handles: list[Handle] = []

        def make(name: str, *_: Any) -> Any:
            handles.append(Handle())
            return RayReplica(name, lambda handle=handles[-1]: handle, lambda: None)  # type: ignore[misc]

        client = ClusterClient(EngineConfig(model="fake"), {}, make=make, placement=LeastLoaded(Prices()), count=2)
        await client.start()
        begun = asyncio.Event()

        async def answer(number: int) -> bool:
            made: list[int] = []
            async for output in client.generate(NewRequest(id=f"r{number}", prompt=[number, 7], params=PARAMS)):
                made += output.tokens
                begun.set()
            return made == generate([number, 7], None, 60, frozenset())

        try:
            asked = [asyncio.create_task(answer(number)) for number in range(8)]
            await begun.wait()
            await handles[0].replace()
            assert all(await asyncio.gather(*asked))
            assert client.num_moved > 0
            while len(client.fleet.serving) < 2:
                await asyncio.sleep(0.02)
            assert client.fleet.replicas["replica-0"].engine.num_restarts == 1
            assert all(await asyncio.gather(*(answer(number) for number in range(20, 24))))
            with pytest.raises(Refused, match="no such folder"):
                await client.load_adapter("a", "/nowhere")
            described, _ = await client.set_scheduler({"policy": "vtc"})
            assert described["policy"] == "vtc"
            with pytest.raises(Refused, match="no_such"):
                await client.set_scheduler({"no_such": 1})
        finally:
            await client.close()
            for handle in handles:
                await handle.actor.client.close()

    asyncio.run(main())
