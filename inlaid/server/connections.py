"""A bound on open connections, so that file descriptors are left for a new engine process, adapters and the next
client.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
from aiohttp import web

from inlaid.server.errors import ErrorBody, ErrorResponse

log = logging.getLogger(__name__)

_RESERVE = 64  # descriptors that connections leave
_LEAST = 16  # connections, and those that may come at once, however few descriptors there are
_MOST_AT_ONCE = (
    1024  # connections that wait to be accepted; they are accepted before one that is closed leaves its place
)
_WANTED = 65_536  # descriptors, if the machine allows

_ERROR = ErrorResponse(ErrorBody("all connections are in use; try again", "server_error", code="no_connection"))


class Connections:
    """The open connections. When there are too many, an idle one is closed for the next; if none is idle, the next is
    answered 503."""

    def __init__(self, most: int, at_once: int = _MOST_AT_ONCE) -> None:
        self._most = most
        self.at_once = at_once  # for the queue of those that wait to be accepted
        self._busy: set[asyncio.Protocol] = set()

    @contextmanager
    def busy(self, request: web.BaseRequest) -> Iterator[None]:
        """Mark a request's connection as one that is needed."""
        self._busy.add(request.protocol)
        try:
            yield
        finally:
            self._busy.discard(request.protocol)

    def bounded(self, server: web.Server) -> Callable[[], asyncio.Protocol]:
        """Return what makes the protocol of a new connection to a server."""

        def accept() -> asyncio.Protocol:
            is_room = len(server.connections) < self._most or self._close_idle(server)
            return server() if is_room else _Full()

        return accept

    def _close_idle(self, server: web.Server) -> bool:
        """Close the oldest idle connection; False if all are busy."""
        for handler in server.connections:
            if handler not in self._busy and handler.transport is not None:  # None: it is being closed
                handler.force_close()
                return True
        return False


class _Full(asyncio.Protocol):
    """A connection that is answered before it asks."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say that there is no room."""
        assert isinstance(transport, asyncio.Transport)
        body = msgspec.json.encode(_ERROR)
        transport.write(
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        transport.close()


def most_connections() -> tuple[int, int]:
    """Raise this process's limit of descriptors as far as the machine allows. Return how many connections it leaves
    room for, and how many may come at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (ValueError, OSError) as error:
            log.warning("only %d file descriptors are allowed: %s", soft, error)
    descriptors = _WANTED if soft == resource.RLIM_INFINITY else soft
    at_once = max(_LEAST, min(_MOST_AT_ONCE, descriptors // 8))
    return max(_LEAST, descriptors - _RESERVE - at_once), at_once
