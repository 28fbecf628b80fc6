"""The parts around every route, and the answers while there is no engine."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request

from inlaid.config import EngineConfig, ServerConfig
from inlaid.server import app
from inlaid.server.access import NOTES, _Note, logged
from inlaid.server.bodies import read_body
from inlaid.server.errors import BadRequest
from inlaid.server.metrics import Metrics
from inlaid.server.names import ModelNames
from inlaid.server.safety import AllowedFolders, Keys
from inlaid.server.service import SERVICE, Service
from inlaid.text.encoder import RequestEncoder
from inlaid.text.tools.answer import ModelForms
from inlaid.worker.client import EngineClient
from tests.worker.fake_engine import ENVIRONMENT, FACTORY


async def _answer_to(sent: bytes, config: ServerConfig, end: bytes) -> bytes:
    """Return the answer of a server with one route, which reads its body, to these bytes, up to `end`. Without an end,
    leave."""

    class Stub:
        pass

    stub: Any = Stub()
    stub.config = config
    stub.traces = None

    async def read(request: web.Request) -> web.Response:
        answer = web.Response(text=str(len(await read_body(request, config.body_timeout))))
        answer.force_close()
        return answer

    application = web.Application(middlewares=[logged, app._errors])
    application[NOTES] = {}
    application[SERVICE] = cast(Service, stub)
    application.router.add_post("/", read)
    runner = web.AppRunner(application, logger=app.http_log())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        reader, writer = await asyncio.open_connection(*runner.addresses[0][:2])
        writer.write(sent)
        answer = await reader.readuntil(end) if end else b""
        writer.close()
        await writer.wait_closed()
        return answer
    finally:
        await runner.cleanup()


def test_a_body_that_dribbles_is_given_up() -> None:
    half = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    head, _, body = asyncio.run(_answer_to(half, ServerConfig(body_timeout=0.05), b"}}")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert b"Connection: close" in head
    assert "--body-timeout" in json.loads(body)["error"]["message"]


def test_a_whole_body_is_read() -> None:
    whole = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nabcd"
    for seconds in (60.0, 0.0):  # 0 is any time, not none
        answer = asyncio.run(_answer_to(whole, ServerConfig(body_timeout=seconds), b"\r\n\r\n4"))
        assert answer.startswith(b"HTTP/1.1 200")


def test_a_body_that_is_not_what_its_headers_say_is_a_bad_request() -> None:
    broken = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 9\r\n\r\n\x1f\x8bbroken!"
    head, _, body = asyncio.run(_answer_to(broken, ServerConfig(), b"}}")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert "cannot be read" in json.loads(body)["error"]["message"]


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    half = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    asyncio.run(_answer_to(half, ServerConfig(), b""))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_what_a_refused_request_held_is_free_when_it_is_answered() -> None:
    """The error and the frame that caught it were a cycle; collecting that freed a gigabyte on the event loop."""

    class Held:
        pass

    held: list[weakref.ref[Held]] = []

    async def refuse(request: web.Request) -> web.Response:
        body = Held()
        held.append(weakref.ref(body))
        raise BadRequest("no")

    application = web.Application()
    request = make_mocked_request("POST", "/", app=application)
    application[NOTES] = {request.protocol: _Note()}
    gc.disable()
    try:
        assert asyncio.run(app._errors(request, refuse)).status == 400
        assert held[0]() is None
    finally:
        gc.enable()


@asynccontextmanager
async def over_fake_engine(
    adapters: dict[str, str], config: ServerConfig | None = None, **options: Any
) -> AsyncIterator[tuple[EngineClient, Service]]:
    """Run a service whose engine has a fake model, and no tokenizer."""
    engine = EngineClient(EngineConfig(model="fake"), adapters, factory=FACTORY, environment=ENVIRONMENT, **options)
    await engine.start()
    service = Service(
        config=config or ServerConfig(),
        engine=engine,
        encoder=RequestEncoder(cast(Any, None), 50, 900),
        forms=ModelForms.of("", "auto", "auto"),
        metrics=Metrics("base", 10),
        keys=Keys((), None),
        folders=AllowedFolders([]),
        names=ModelNames("base", "fake"),
        model_path="fake",
        public_path="fake",
        started=0,
    )
    try:
        yield engine, service
    finally:
        await engine.close()


def test_while_the_engine_is_down_models_are_named_and_no_state_is_made_up(tmp_path: Path) -> None:
    async def listed(client: TestClient[Any, Any]) -> list[dict[str, Any]]:
        data = (await (await client.get("/v1/models")).json())["data"]
        assert (await (await client.get("/v1/models/a")).json()) == data[1]
        return cast(list[dict[str, Any]], data)

    async def main() -> None:
        down = asyncio.Event()
        dying: dict[str, Any] = {"on_death": "exit", "give_up": lambda reason: down.set()}
        async with (
            over_fake_engine({"a": str(tmp_path)}, **dying) as (engine, service),
            TestClient(TestServer(app.make_app(service))) as client,
        ):
            base, card = await listed(client)
            assert (base["id"], card["id"], card["adapter"]["tier"]) == ("base", "a", "host")
            assert engine.process_id is not None
            os.kill(engine.process_id, signal.SIGKILL)
            await down.wait()
            del card["adapter"]
            assert await listed(client) == [base, card]

    asyncio.run(main())


def test_health_tells_of_an_engine_that_does_not_answer_and_of_background_tasks() -> None:
    """A stopped process is no dead one: /health once said that all was well."""

    async def main() -> None:
        async with (
            over_fake_engine({}, ServerConfig(health_timeout=0.3)) as (engine, service),
            TestClient(TestServer(app.make_app(service))) as client,
        ):
            service.background.start("a task", asyncio.Event().wait)
            health = await (await client.get("/health")).json()
            assert health == {"status": "ok", "restarts": 0, "background": {"a task": "running", "console": "running"}}
            assert engine.process_id is not None
            os.kill(engine.process_id, signal.SIGSTOP)
            while (answer := await client.get("/health")).status == 200:
                await asyncio.sleep(0.05)
            assert answer.status == 503
            assert "has not answered" in (await answer.json())["error"]["message"]
            for path in ("/metrics", "/v1/models"):  # without what only the engine knows, and not after half a minute
                assert (await asyncio.wait_for(client.get(path), 20)).status == 200
            os.kill(engine.process_id, signal.SIGCONT)
            while (await client.get("/health")).status != 200:
                await asyncio.sleep(0.05)
            await service.background.close()

    asyncio.run(main())
