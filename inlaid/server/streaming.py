"""Server-sent events: answers as they come. Headers go out with the first piece, so that a refusal still is a proper
HTTP status; what fails later is an event with the error.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from aiohttp import web

from inlaid.server.errors import told

_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def send(request: web.Request, events: AsyncGenerator[bytes, None]) -> web.StreamResponse:
    """Write events until they end. A client that reads slowly slows this down; one that goes cancels it."""
    async with aclosing(events):
        first = await anext(events)
        response = web.StreamResponse(headers=_HEADERS)
        await response.prepare(request)
        async with aclosing(_to_the_end(events)) as rest:
            with suppress(OSError):  # the client has gone; closing the events aborts the request
                await response.write(first)
                async for data in rest:
                    await response.write(data)
                await response.write_eof()
        return response


async def _to_the_end(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The events, what went wrong with them if anything did, and the mark of the end."""
    try:
        async for data in events:
            yield data
    except Exception as error:  # noqa: BLE001 - what is not known is logged
        yield event(told(error, "a stream").body)
    yield b"data: [DONE]\n\n"
