"""Images: written once by a replica that serves, anew when what it serves has changed, and not at all if it refuses."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inlaid.cluster.client import ClusterClient
from inlaid.cluster.command import local_replicas
from inlaid.cluster.fleet import Fleet
from inlaid.cluster.images import Images
from inlaid.cluster.placement import LeastLoaded
from inlaid.cluster.view import Prices
from inlaid.config import EngineConfig
from inlaid.engine.refusal import Refusal, Refused
from inlaid.worker.errors import EngineDead
from tests.worker.fake_engine import ENVIRONMENT, FACTORY


class Writes:
    """An engine that writes a few bytes for an image."""

    def __init__(self, error: Exception | None = None) -> None:
        self.model = SimpleNamespace(base_version="v")
        self.adapters: dict[str, Any] = {}
        self.num_restarts, self.ready, self.image = 0, True, ""
        self.paths: list[str] = []
        self._error = error

    async def call(self, method: str, /, **arguments: Any) -> Any:
        if self._error is not None:
            raise self._error
        assert method == "write_image"
        self.paths.append(arguments["path"])
        with open(arguments["path"], "wb") as file:
            return file.write(b"weights %d" % len(self.paths))

    async def start(self) -> None: ...

    async def close(self) -> None: ...


def test_an_image_is_kept_until_what_is_served_changes() -> None:
    async def main() -> None:
        images, engine = Images(), Writes()
        first = await images.of(engine)  # type: ignore[arg-type]
        assert Path(first).read_bytes() == b"weights 1"
        assert await images.of(engine) == first  # type: ignore[arg-type]
        with pytest.raises(OSError, match="Operation not permitted"):
            os.truncate(first, 3)
        engine.adapters["a"] = SimpleNamespace(path="p", identity="i")
        second = await images.of(engine)  # type: ignore[arg-type]
        assert Path(second).read_bytes() == b"weights 2"
        assert images.bytes == len(b"weights 2")
        images.close()
        assert not Path(second).exists()

    asyncio.run(main())


def test_an_engine_that_refuses_is_asked_once_and_one_that_dies_again() -> None:
    async def main() -> None:
        refused = Writes(Refused(Refusal("weights on cuda are not written to an image")))
        images = Images()
        assert await images.of(refused) == ""  # type: ignore[arg-type]
        assert await images.of(Writes()) == ""  # type: ignore[arg-type]
        images = Images()
        assert await images.of(Writes(EngineDead("gone"))) == ""  # type: ignore[arg-type]
        assert await images.of(Writes()) != ""  # type: ignore[arg-type]
        images.close()

    asyncio.run(main())


def test_replicas_that_are_added_start_from_the_image_and_the_first_does_not() -> None:
    async def main() -> None:
        engines: list[Writes] = []

        def make(*_: Any) -> Any:
            engines.append(Writes())
            return engines[-1]

        fleet = Fleet(EngineConfig(model="m"), {}, make, give_up=lambda reason: None)
        fleet.images = Images()
        for _ in range(3):
            await fleet.add()
        assert [bool(engine.image) for engine in engines] == [False, True, True]
        assert engines[0].paths == [engines[1].image]
        assert engines[2].image == engines[1].image
        await fleet.close()
        assert not Path(engines[2].image).exists()

    asyncio.run(main())


def test_a_process_waits_for_the_next_replica_and_ends_with_the_cluster() -> None:
    async def main() -> None:
        config = EngineConfig(model="fake")
        make = local_replicas(factory=FACTORY, environment=ENVIRONMENT)
        client = ClusterClient(config, {}, make=make, placement=LeastLoaded(Prices()), count=1)
        client.fleet.keeps_standby = True
        await client.start()
        try:
            (name, waiting), first = _standby(client), client.fleet.replicas["replica-0"].engine
            client.fleet.config = replace(config, seed=7)
            added = await client.fleet.add()
            assert (added.name, added.engine) == (name, waiting) == ("replica-1", added.engine)
            assert added.engine.config.seed == 7, "what is to be loaded is said when it is known"
            assert added.engine.ready
            name, waiting = _standby(client)
            assert name == "replica-2"
            assert waiting not in (first, added.engine)
            assert not waiting.ready
            dead = waiting._link.process
            dead.kill()
            await dead.wait()
            assert (await client.fleet.add()).name == "replica-3", "one that has ended is not waited for"
            name, waiting = _standby(client)
        finally:
            await client.close()
        processes = [engine._link.process for engine in (first, added.engine, waiting)]  # type: ignore[attr-defined]
        assert all(process.returncode is not None for process in processes)

    asyncio.run(main())


def _standby(client: ClusterClient) -> tuple[str, Any]:
    assert client.fleet._standby is not None
    return client.fleet._standby
