"""Server-sent events: answers as they come. Headers go out with the first piece, so that a refusal is a proper HTTP
status; a later failure is an event with the error.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from types import MappingProxyType
from typing import Any

import msgspec
from aiohttp import web

from inlaid.server.errors import reported

_HEADERS: Mapping[str, str] = MappingProxyType(
    {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
)


def event(value: Any) -> bytes:
    """Return a value as one event."""
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
    """Yield the events, an event with the error if they fail, and the mark of the end."""
    try:
        async for data in events:
            yield data
    except Exception as error:  # noqa: BLE001 - what is not known is logged
        yield event(reported(error, "a stream").body)
    yield b"data: [DONE]\n\n"
