"""Server-sent events: answers as they come. Headers go out with the first piece, so that a refusal is a proper HTTP
status; a later failure is an event with the error.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from types import MappingProxyType
from typing import Any

import msgspec
from aiohttp import web

from inlaid.server.access import note_error
from inlaid.server.errors import ApiError, reported

log = logging.getLogger(__name__)

_HEADERS: Mapping[str, str] = MappingProxyType(
    {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
)


DONE = b"data: [DONE]\n\n"  # how streams of completions end


def event(value: Any) -> bytes:
    """Return a value as one event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """Return a value as one event with its name on a line of its own."""
    return b"event: " + name.encode() + b"\n" + event(value)


def failure(error: ApiError) -> bytes:
    """Return the event that ends a stream which has failed."""
    return event(error.body)


async def send(
    request: web.Request,
    events: AsyncGenerator[bytes, None],
    patience: float = 0.0,
    done: bytes = DONE,
    failed: Callable[[ApiError], bytes] = failure,
) -> web.StreamResponse:
    """Write events until they end or fail, and then `done`; `failed` makes the event of a failure. A client that reads
    slowly slows this down; one that goes cancels it; one that lets a write wait longer than `patience` seconds (0: any)
    is disconnected."""
    async with aclosing(events):
        first = await anext(events)
        response = web.StreamResponse(headers=_HEADERS)
        await response.prepare(request)
        async with aclosing(_to_the_end(request, events, done, failed)) as rest:
            with (
                suppress(OSError),
                _Watch(request.transport, patience) as watch,
            ):  # closing the events aborts the request
                await watch.write(response, first)
                async for data in rest:
                    await watch.write(response, data)
                await response.write_eof()
        return response


class _Watch:
    """Ends a connection that does not drain. One timer a stream costs less than one a write."""

    def __init__(self, transport: asyncio.Transport | None, patience: float) -> None:
        self._transport = transport
        self._patience = patience
        self._since: float | None = None  # when the write began that has not ended
        self._timer: asyncio.TimerHandle | None = None

    async def write(self, response: web.StreamResponse, data: bytes) -> None:
        """Write some data, and wait until it is on its way."""
        self._since = time.monotonic()
        await response.write(data)
        self._since = None

    def __enter__(self) -> _Watch:
        if self._patience and self._transport is not None:
            self._look()
        return self

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        if self._since is not None and time.monotonic() - self._since > self._patience and self._transport is not None:
            log.warning("a client has not read its stream for %g s and is disconnected", self._patience)
            self._transport.abort()
        else:
            self._timer = asyncio.get_running_loop().call_later(self._patience / 2, self._look)


async def _to_the_end(
    request: web.Request, events: AsyncGenerator[bytes, None], done: bytes, failed: Callable[[ApiError], bytes]
) -> AsyncGenerator[bytes, None]:
    """Yield the events, an event with the error if they fail, and the mark of the end."""
    try:
        async for data in events:
            yield data
    except Exception as error:  # noqa: BLE001 - what is not known is logged
        known = reported(error, "a stream")
        note_error(request, known.message)
        yield failed(known)
    yield done
