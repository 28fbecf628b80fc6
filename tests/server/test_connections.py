"""Connections: idle ones make room, and busy ones are kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from inlaid.server.connections import Connections, most_connections

Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def bounded(most: int, come: asyncio.Semaphore, go: asyncio.Event) -> AsyncIterator[tuple[str, int]]:
    """Serve `/now` at once, and `/later`, once it has come, after `go`, with at most so many connections."""
    connections = Connections(most)

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        with connections.busy(request):
            if request.path == "/later":
                come.release()
                await go.wait()
            return web.Response(text=request.path)

    server = web.Server(handle)
    accepting = await asyncio.get_running_loop().create_server(connections.bounded(server), "127.0.0.1", 0)
    try:
        yield accepting.sockets[0].getsockname()[:2]
    finally:
        accepting.close()
        await server.shutdown()


async def ask(address: tuple[str, int], path: str) -> Pair:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return reader, writer


def test_the_oldest_idle_connection_makes_room() -> None:
    async def main() -> None:
        async with bounded(2, asyncio.Semaphore(0), asyncio.Event()) as address:
            pairs: list[Pair] = []
            for _ in range(3):
                pairs.append(await ask(address, "/now"))
                assert (await pairs[-1][0].readuntil(b"/now")).startswith(b"HTTP/1.1 200")
            assert await pairs[0][0].read() == b""  # it was closed
            for _, writer in pairs:
                writer.close()

    asyncio.run(main())


def test_busy_connections_are_kept_and_the_next_is_told() -> None:
    async def main() -> None:
        come, go = asyncio.Semaphore(0), asyncio.Event()
        async with bounded(2, come, go) as address:
            pairs = [await ask(address, "/later") for _ in range(2)]
            for _ in pairs:
                await come.acquire()
            told, late = await ask(address, "/now")
            answer = await told.read()
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"all connections are in use" in answer
            go.set()
            for reader, _ in pairs:
                assert (await reader.readuntil(b"/later")).startswith(b"HTTP/1.1 200")
            for writer in (late, *(writer for _, writer in pairs)):
                writer.close()

    asyncio.run(main())


def test_descriptors_are_left_for_the_server_itself() -> None:
    most, at_once = most_connections()
    assert 16 <= at_once <= 1024
    assert 16 <= most <= 65_536 - 64 - at_once
