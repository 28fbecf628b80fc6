"""The aiohttp application: the routes, and what surrounds each of them: keys, bodies, errors."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from inlaid.config import ServerConfig
from inlaid.server.access import NOTES, add_warnings, logged, note_error, note_route, warn_client
from inlaid.server.bodies import read_body
from inlaid.server.console import CONSOLE_ROUTES, add_console
from inlaid.server.cors import allow_origins
from inlaid.server.decoding import BodyDecoder, warning
from inlaid.server.errors import (
    BadRequest,
    Unavailable,
    no_such_path,
    reported,
    response,
    undecodable,
)
from inlaid.server.openapi import Facts, document, plain_path
from inlaid.server.route import Guard, Route
from inlaid.server.routes import ROUTES
from inlaid.server.service import SERVICE, Service

log = logging.getLogger(__name__)

_MAX_FIELDS = 100_000  # of a body, beside one for each token of the context
_MAX_LOGGED = 1000  # unknown fields; later ones are told to the client alone

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(service: Service) -> web.Application:
    """Make the application of a service."""
    app = web.Application(client_max_size=service.max_body_bytes, middlewares=[_busy, logged, _errors])
    app[SERVICE] = service
    app[NOTES] = {}
    for route in routes_of(service.config):
        handler = _served(route, service.config.strict_requests)
        app.router.add_route(route.method, route.path, handler)
        if route.method == "GET":
            app.router.add_route("HEAD", route.path, handler)
    description = msgspec.json.encode(document(ROUTES, _facts(service)))

    async def openapi(request: web.Request) -> web.Response:
        return web.Response(body=description, content_type="application/json")

    app.router.add_get("/openapi.json", openapi)
    app.on_response_prepare.append(add_warnings)
    if service.config.console:
        add_console(app, service)
    if service.config.allowed_origins:
        allow_origins(app, service.config.allowed_origins)
    return app


def routes_of(config: ServerConfig) -> tuple[Route, ...]:
    """Return the routes that a server of this configuration answers; those of the console are no part of the API."""
    return (*ROUTES, *(CONSOLE_ROUTES if config.console else ()))


def _facts(service: Service) -> Facts:
    """Return what the API's description must know of this server."""
    keyed = bool(service.keys.tenants)
    guarded = {Guard.INFERENCE: keyed, Guard.OPERATOR: keyed or service.keys.has_admin, Guard.ADMIN: True}
    return Facts(
        service.encoder.vocab_size,
        service.config.max_prompts,
        frozenset(guard for guard, needed in guarded.items() if needed),
        service.config.strict_requests,
    )


def _served(route: Route, strict: bool) -> Handler:
    """Return a route's handler with its guard and its body's decoder around it."""
    decoder = None if route.body is None else BodyDecoder(route.body, strict or not route.lenient)

    async def handle(request: web.Request) -> web.StreamResponse:
        service = request.app[SERVICE]
        note_route(request, route)
        _check_key(service, route.guard, request.headers)
        if not route.answering:
            return await _call(route, decoder, request)
        if service.draining:
            raise Unavailable("the server is shutting down", retry_after=5)
        service.num_in_flight += 1
        try:
            return await _call(route, decoder, request)
        finally:
            service.num_in_flight -= 1

    return handle


async def _call(route: Route, decoder: BodyDecoder | None, request: web.Request) -> web.StreamResponse:
    if decoder is None:
        return await route.handler(request)
    data = await read_body(request, request.app[SERVICE].config.body_timeout)
    _check_fields(request.app[SERVICE], data)
    try:
        body, ignored = await request.app[SERVICE].offload.run(len(data), decoder.decode, data)
    except msgspec.DecodeError as error:
        raise undecodable(error, data) from error
    if ignored:
        _report_ignored(request, route, ignored)
    return await route.handler(request, body)


def _check_fields(service: Service, data: bytes) -> None:
    """Refuse a body of very many fields before it is decoded: making objects of them holds the interpreter's lock."""
    most = _MAX_FIELDS + service.encoder.max_model_len
    if (count := data.count(b":")) > most:
        raise BadRequest(f"the body has {count} fields, or colons in its texts; at most {most} are read")


def _report_ignored(request: web.Request, route: Route, ignored: list[str]) -> None:
    """Name fields that were left out: to the client in a header of the answer, and once each in the log."""
    warn_client(request, warning(ignored))
    logged = request.app[SERVICE].ignored_fields
    fresh = [name for name in ignored if f"{route.path} {name}" not in logged]
    if fresh and len(logged) < _MAX_LOGGED:
        logged.update(f"{route.path} {name}" for name in fresh)
        log.warning("%s: unknown fields are ignored: %s", route.path, ascii(", ".join(fresh)[:1000]))


def _check_key(service: Service, guard: Guard, headers: Mapping[str, str]) -> None:
    if guard is Guard.ADMIN or (guard is Guard.OPERATOR and service.keys.has_admin):
        service.keys.check_admin(headers)
    elif guard is not Guard.OPEN:
        service.keys.check_inference(headers)


@web.middleware
async def _busy(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Keep the connection of a request that is being answered."""
    with request.app[SERVICE].connections.busy(request):
        return await handler(request)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error in one form."""
    try:
        return await handler(request)
    except ConnectionError:
        raise  # the client has left: nobody reads an answer, and aiohttp ends the connection
    except Exception as error:  # noqa: BLE001 - a defect is logged
        return _answer(request, error)


def _answer(request: web.Request, error: Exception) -> web.Response:
    """Return the answer to an error. A name for it in the frame that caught it would be a cycle, and keep the body of
    its request, and whatever was made of that, until garbage is collected on the event loop."""
    known = reported(error, f"{request.method} {request.path}")
    if isinstance(error, web.HTTPNotFound):
        known = no_such_path(request.path, {plain_path(route) for route in ROUTES})
    note_error(request, known.message)
    return response(known, for_anthropic=request.path.startswith("/v1/messages"))


def http_log() -> logging.Logger:
    """Return aiohttp's logger without the faults of clients, each of which it would log with a traceback."""

    def is_ours(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, (HttpProcessingError, web.RequestPayloadError, ConnectionError))

    logger = logging.getLogger(__name__).getChild("http")
    logger.addFilter(is_ours)
    return logger
