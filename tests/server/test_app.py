"""What surrounds every route, without an engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

from aiohttp import web

from inlaid.config import ServerConfig
from inlaid.server import app
from inlaid.server.service import SERVICE, Service


async def _answer_to(sent: bytes, config: ServerConfig, end: bytes) -> bytes:
    """What a server with one route that reads its body says to these bytes, up to where that ends."""

    class Stub:
        pass

    stub: Any = Stub()
    stub.config = config

    async def read(request: web.Request) -> web.Response:
        answer = web.Response(text=str(len(await app._body(request))))
        answer.force_close()
        return answer

    application = web.Application(middlewares=[app._errors])
    application[SERVICE] = cast(Service, stub)
    application.router.add_post("/", read)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        reader, writer = await asyncio.open_connection(*runner.addresses[0][:2])
        writer.write(sent)
        answer = await reader.readuntil(end)
        writer.close()
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
