"""Cross-origin requests (CORS): pages of the allowed origins may call the API from a browser."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from inlaid.config import ConfigError

_ORIGIN = re.compile(r"https?://[^/?#@\s]+")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

METHODS = "GET, HEAD, POST, PUT, DELETE, OPTIONS"
_SECONDS = "600"  # that a browser may keep the answer to a preflight request


def check_origins(origins: Sequence[str]) -> None:
    """Refuse what no browser sends as an origin, such as one with a path."""
    for origin in origins:
        if origin != "*" and _ORIGIN.fullmatch(origin) is None:
            raise ConfigError(f"--allowed-origins {origin!r} is no origin: give https://host, https://host:port or *")


def allow_origins(app: web.Application, origins: Sequence[str]) -> None:
    """Let an application answer preflight requests, and mark its answers for these origins."""
    allowed = frozenset(origins)

    def allows(request: web.BaseRequest) -> str | None:
        origin = request.headers.get("Origin")
        return origin if origin is not None and ("*" in allowed or origin in allowed) else None

    @web.middleware
    async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return await handler(request)
        answer = web.Response(status=204)
        if allows(request) is not None:
            answer.headers["Access-Control-Allow-Methods"] = METHODS
            answer.headers["Access-Control-Allow-Headers"] = request.headers.get("Access-Control-Request-Headers", "*")
            answer.headers["Access-Control-Max-Age"] = _SECONDS
        return answer

    async def mark(request: web.Request, response: web.StreamResponse) -> None:
        """Add the headers before an answer begins, streams included."""
        response.headers.add("Vary", "Origin")
        if (origin := allows(request)) is not None:
            response.headers["Access-Control-Allow-Origin"] = origin

    app.middlewares.append(preflight)
    app.on_response_prepare.append(mark)
