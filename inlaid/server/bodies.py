"""Bodies of requests: read within their bounds, so that other clients are served meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from inlaid.server.errors import BrokenBody, TooSlow

_SIZE: Any = web.RequestKey("body size", int) if hasattr(web, "RequestKey") else "body size"  # aiohttp before 3.14


async def read_body(request: web.Request, seconds: float) -> bytes:
    """Read the whole body. A client that sends it too slowly must not hold a connection for ever."""
    try:
        body = await asyncio.wait_for(_read(request), seconds or None)
    except asyncio.TimeoutError:
        raise TooSlow(f"the request body did not arrive within {seconds:g} s (--body-timeout)") from None
    except web.HTTPRequestEntityTooLarge:
        if "Content-Encoding" in request.headers:  # the rest would be inflated, to be thrown away
            request.content.set_exception(web.RequestPayloadError("the body is too large"))
        raise
    except web.RequestPayloadError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise BrokenBody(f"the request body cannot be read: {reason}") from error
    request[_SIZE] = len(body)
    return body


def body_size(request: web.Request) -> int:
    """Return the bytes of the body that was read."""
    return int(request[_SIZE])


async def _read(request: web.Request) -> bytes:
    """Read piece by piece. `Request.read` inflates as much at once as a body may have, which takes 0.1 s."""
    body, most = bytearray(), request.client_max_size
    while piece := await request.content.readany():
        body += piece
        if len(body) > most:
            raise web.HTTPRequestEntityTooLarge(most, len(body))
        await asyncio.sleep(0)  # a piece that is inflated is there at once
    return bytes(body)
