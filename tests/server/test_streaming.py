"""A stream of events to a client that leaves, or does not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from inlaid.server import streaming


@pytest.mark.parametrize("fails", ["write", "write_eof"])
def test_a_client_that_leaves_at_any_write_is_no_error(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between the last event and the end of the answer; whatever makes the events is closed."""
    closed: list[str] = []

    class Response:
        def __init__(self, headers: Any) -> None:
            self.writes = 0

        async def prepare(self, request: Any) -> None: ...

        async def write(self, data: bytes) -> None:
            self.writes += 1
            if fails == "write" and self.writes == 2:
                raise ConnectionResetError

        async def write_eof(self) -> None:
            if fails == "write_eof":
                raise ConnectionResetError

    async def events() -> Any:
        try:
            for _ in range(3):
                yield b"data: 1\n\n"
        finally:
            closed.append("events")

    monkeypatch.setattr(web, "StreamResponse", Response)
    request: Any = SimpleNamespace(transport=None)
    sent: Any = asyncio.run(streaming.send(request, events()))
    assert closed == ["events"]
    assert sent.writes == {"write": 2, "write_eof": 4}[fails]


def test_a_client_that_does_not_read_is_disconnected() -> None:
    """Its answer once went on to be made, and kept, without end."""

    async def main() -> None:
        closed = asyncio.Event()

        async def events() -> AsyncGenerator[bytes, None]:
            try:
                while True:
                    yield b"x" * 1_000_000
            finally:
                closed.set()

        async def handle(request: web.Request) -> web.StreamResponse:
            return await streaming.send(request, events(), patience=0.1)

        application = web.Application()
        application.router.add_get("/", handle)
        async with TestServer(application) as server:
            _, writer = await asyncio.open_connection(server.host, server.port, limit=1)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await closed.wait()
            writer.close()

    asyncio.run(main())
