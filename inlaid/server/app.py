"""The aiohttp application: the table of routes, what surrounds each of them, and the life of a server from start to
drained. `inlaid serve` calls `serve`; tests make an application with `make_app`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from inlaid.config import ConfigError, EngineConfig, ServerConfig
from inlaid.server import admin, info, native, protocol
from inlaid.server.completions import chat_completions, completions
from inlaid.server.errors import TooSlow, Unavailable, response, told, undecodable
from inlaid.server.metrics import Metrics
from inlaid.server.openapi import document
from inlaid.server.resolver import make_resolver
from inlaid.server.route import Guard, Route
from inlaid.server.safety import AllowedFolders, Keys, check_config
from inlaid.server.service import SERVICE, Service
from inlaid.server.watcher import Watcher
from inlaid.text.tokenizer import Tokenizer
from inlaid.worker.client import AsyncEngine, EngineDead
from inlaid.worker.process import process_age

log = logging.getLogger(__name__)

_IDLE_SECONDS = 75.0  # that a connection without a request stays open, its headers half sent included

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

ROUTES = (
    Route(
        "POST",
        "/v1/completions",
        completions,
        body=protocol.CompletionBody,
        answers=(protocol.Completion, protocol.Completion),
        answering=True,
    ),
    Route(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        body=protocol.ChatBody,
        answers=(protocol.ChatCompletion, protocol.ChatChunk),
        answering=True,
    ),
    Route(
        "POST",
        "/generate",
        native.generate,
        body=protocol.NativeBody,
        answers=(protocol.Generation | list[protocol.Generation], protocol.Generation),
        answering=True,
    ),
    Route("GET", "/v1/models", info.models, answers=(protocol.ModelList,)),
    Route("GET", "/v1/models/{name:.+}", info.model, answers=(protocol.ModelCard,)),
    Route("POST", "/tokenize", info.tokenize, body=protocol.TokenizeBody, answers=(protocol.Tokens,)),
    Route("POST", "/detokenize", info.detokenize, body=protocol.DetokenizeBody, answers=(protocol.Detokenized,)),
    Route("GET", "/health", info.health, Guard.OPEN, answers=(protocol.Health,)),
    Route("GET", "/ready", info.ready, Guard.OPEN, answers=(protocol.Health,)),
    Route("GET", "/health_generate", info.health_generate, answers=(protocol.Health,)),
    Route("GET", "/version", info.version, Guard.OPEN, answers=(protocol.Version,)),
    Route("GET", "/get_model_info", info.model_info, answers=(protocol.ModelSummary,)),
    Route("GET", "/model_info", info.model_info, answers=(protocol.ModelSummary,)),
    Route("GET", "/get_server_info", native.server_info, answers=(protocol.ServerInfo,)),
    Route("GET", "/server_info", native.server_info, answers=(protocol.ServerInfo,)),
    Route("POST", "/flush_cache", native.flush_cache, Guard.OPERATOR, text=True),
    Route("GET", "/metrics", info.metrics, Guard.OPEN, text=True),
    Route("GET", "/v1/adapters", admin.list_adapters, answers=(protocol.AdapterList,)),
    Route("POST", "/v1/load_lora_adapter", admin.load_adapter, Guard.ADMIN, protocol.LoadAdapterBody, text=True),
    Route("POST", "/v1/unload_lora_adapter", admin.unload_adapter, Guard.ADMIN, protocol.UnloadAdapterBody, text=True),
    Route(
        "POST",
        "/load_lora_adapter",
        admin.load_adapter_sglang,
        Guard.ADMIN,
        protocol.LoadAdapterBody,
        (protocol.LoadResult,),
    ),
    Route(
        "POST",
        "/unload_lora_adapter",
        admin.unload_adapter_sglang,
        Guard.ADMIN,
        protocol.UnloadAdapterBody,
        (protocol.LoadResult,),
    ),
    Route("GET", "/v1/scheduler", admin.get_scheduler, Guard.OPERATOR, answers=(dict[str, Any],)),
    Route("PUT", "/v1/scheduler", admin.put_scheduler, Guard.ADMIN, protocol.SchedulerBody, (dict[str, Any],)),
    Route(
        "GET",
        "/v1/fairness",
        admin.fairness,
        Guard.OPERATOR,
        answers=(dict[str, Any],),
        query=(("window", "number"),),
    ),
)


def make_app(service: Service) -> web.Application:
    """The application that serves this."""
    app = web.Application(client_max_size=int(service.config.max_body_mib * 2**20), middlewares=[_errors])
    app[SERVICE] = service
    for route in ROUTES:
        app.router.add_route(route.method, route.path, _served(route))
    description = msgspec.json.encode(document(ROUTES))

    async def openapi(request: web.Request) -> web.Response:
        return web.Response(body=description, content_type="application/json")

    app.router.add_get("/openapi.json", openapi)
    return app


def _served(route: Route) -> Handler:
    """A route's handler with its guard and its body's decoder around it."""
    decoder = None if route.body is None else msgspec.json.Decoder(route.body)

    async def handle(request: web.Request) -> web.StreamResponse:
        service = request.app[SERVICE]
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


async def _call(route: Route, decoder: msgspec.json.Decoder[Any] | None, request: web.Request) -> web.StreamResponse:
    if decoder is None:
        return await route.handler(request)
    data = await _body(request)
    try:
        body = decoder.decode(data)
    except msgspec.DecodeError as error:
        raise undecodable(error, data) from error
    return await route.handler(request, body)


async def _body(request: web.Request) -> bytes:
    """The whole body; a client that dribbles it must not hold a connection for ever."""
    seconds = request.app[SERVICE].config.body_timeout
    try:
        return await asyncio.wait_for(request.read(), seconds or None)
    except asyncio.TimeoutError:
        raise TooSlow(f"the request body did not arrive within {seconds:g} s (--body-timeout)") from None


def _check_key(service: Service, guard: Guard, headers: Mapping[str, str]) -> None:
    if guard is Guard.ADMIN or (guard is Guard.OPERATOR and service.keys.has_admin):
        service.keys.check_admin(headers)
    elif guard is not Guard.OPEN:
        service.keys.check_inference(headers)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong is answered in one form."""
    try:
        return await handler(request)
    except Exception as error:  # noqa: BLE001 - what is not known is logged
        return response(told(error, f"{request.method} {request.path}"))


async def make_service(
    config: ServerConfig,
    engine_config: EngineConfig,
    adapters: Mapping[str, str],
    give_up: Callable[[str], None],
    **engine_options: Any,
) -> Service:
    """Start the engine and, where the model is a folder, read its tokenizer meanwhile: importing what reads it takes
    seconds. ConfigError: why it cannot."""
    keys = Keys.of(config, os.environ)
    check_config(config, keys)
    folders = AllowedFolders(config.lora_root)
    model_name = config.served_model_name or model_display_name(engine_config.model)
    if model_name in adapters:
        raise ConfigError(f"an adapter is called {model_name!r} like the base; rename one (--served-model-name)")
    template = None if config.chat_template is None else _read_template(config.chat_template)
    engine = AsyncEngine(
        engine_config,
        adapters,
        on_death=config.on_engine_death,
        timeout=config.engine_timeout,
        give_up=give_up,
        **engine_options,
    )
    resolver = make_resolver(config, engine)
    watchers = [Watcher(Path(folder).expanduser(), engine, (model_name,)) for folder in config.lora_watch]
    reading = None
    if Path(engine_config.model).is_dir():
        reading = asyncio.create_task(asyncio.to_thread(Tokenizer, engine_config.model, template))
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # the engine's reason comes first
    try:
        model = await engine.start()
        tokenizer = await (reading or asyncio.to_thread(Tokenizer, model.folder, template))
    except EngineDead as error:
        raise ConfigError(str(error)) from error
    except (OSError, ValueError) as error:
        await engine.close()
        raise ConfigError(f"the tokenizer of {engine_config.model} cannot be read: {error}") from error
    except BaseException:
        await engine.close()
        raise
    return Service(
        config=config,
        engine=engine,
        tokenizer=tokenizer,
        metrics=Metrics(model_name, config.max_metric_adapters),
        keys=keys,
        folders=folders,
        resolver=resolver,
        watchers=watchers,
        model_name=model_name,
        model_path=engine_config.model,
        public_path=model_name if Path(engine_config.model).is_dir() else engine_config.model,
        max_model_len=min(model.max_model_len, (model.num_blocks - 1) * model.block_size),
        vocab_size=model.vocab_size,
        started=int(time.time()),
    )


def model_display_name(model: str) -> str:
    """A hub id as it is; a folder by its name, or its parent's where the name tells nothing."""
    path = Path(model)
    if not path.is_dir():
        return model
    path = path.resolve()
    return path.parent.name if path.name in ("base", "model") else path.name


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path} cannot be read: {error}") from error


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before anything slow is done. ConfigError: why not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use: stop what listens there, or choose another with --port"
            ) from error
        raise ConfigError(f"cannot listen on {host} port {port}: {error}") from error
    return listener


async def serve(
    config: ServerConfig,
    engine_config: EngineConfig,
    adapters: Mapping[str, str],
    announce: Callable[[Service, str], None],
    **engine_options: Any,
) -> int:
    """Serve until told to stop; the exit status. SIGTERM or SIGINT drains, a second one ends at once."""
    listener = listen(config.host, config.port)
    stop: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def give_up(reason: str) -> None:
        log.error("giving up: %s", reason)
        if not stop.done():
            stop.set_result(1)

    began = process_age()
    service_ready = asyncio.ensure_future(make_service(config, engine_config, adapters, give_up, **engine_options))
    _on_signals(stop, service_ready)
    try:
        service = await service_ready
    except asyncio.CancelledError:
        return 0
    finally:
        if service_ready.cancelled() or service_ready.exception() is not None:
            listener.close()
    runner = web.AppRunner(
        make_app(service),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=1.0,
        keepalive_timeout=_IDLE_SECONDS,
    )
    await runner.setup()
    await web.SockSite(runner, listener, backlog=1024).start()
    watching = [asyncio.create_task(watcher.run(config.lora_watch_interval)) for watcher in service.watchers]
    host, port = listener.getsockname()[:2]
    log.info("start-up: ready %.1f s after the process began, %.1f s of them before the engine", process_age(), began)
    announce(service, f"http://{f'[{host}]' if ':' in host else host}:{port}")
    status = await stop
    for watch in watching:
        watch.cancel()
    if status == 0:
        await drain(service)
    await runner.cleanup()
    await service.engine.close()
    return status


def _on_signals(stop: asyncio.Future[int], starting: asyncio.Future[Service]) -> None:
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if not starting.done():
            starting.cancel()  # nothing is served yet
        elif stop.done():
            if starting.exception() is None:
                starting.result().engine.kill()
            os._exit(1)  # the second signal: now
        else:
            stop.set_result(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)


async def drain(service: Service) -> None:
    """Take nothing new and let what is in flight finish, for as long as configured."""
    service.draining = True
    deadline = time.monotonic() + service.config.drain_timeout
    if service.num_in_flight:
        log.warning("draining: %d requests in flight; another signal ends at once", service.num_in_flight)
    while service.num_in_flight and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    if service.num_in_flight:
        log.warning("%d requests were still in flight after %g s", service.num_in_flight, service.config.drain_timeout)
