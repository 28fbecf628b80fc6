"""Server-sent events: answers as they come. Headers go out with the first piece, so that a refusal still is a proper
HTTP status; what fails later is an event with the error.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from aiohttp import web

from inlaid.server.errors import Fault, translate

log = logging.getLogger(__name__)

_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def send(request: web.Request, events: AsyncGenerator[bytes, None]) -> web.StreamResponse:
    """Write events until they end. A client that reads slowly slows this down; one that goes cancels it."""
    async with aclosing(events):
        first = await anext(events)
        response = web.StreamResponse(headers=_HEADERS)
        await response.prepare(request)
        with suppress(OSError):  # the client has gone; closing the events aborts the request
            await _write(response, first, events)
        return response


async def _write(response: web.StreamResponse, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
    try:
        await response.write(first)
        async for data in events:
            await response.write(data)
    except OSError:
        raise
    except Exception as error:
        known = translate(error)
        if known is None:
            log.error("a stream failed", exc_info=error)
            known = Fault(f"{type(error).__name__} while answering; the server's log has the details")
        await response.write(event(known.body))
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
