"""The life of a server, from start to drained. `inlaid serve` calls `serve`."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from inlaid.config import ConfigError, EngineConfig, ServerConfig, check
from inlaid.quant.online_versions import Versions
from inlaid.server.app import http_log, make_app
from inlaid.server.cors import check_origins
from inlaid.server.metrics import Metrics
from inlaid.server.names import ModelNames
from inlaid.server.online import OnlineTasks, adapters_of, open_versions, with_changing_base
from inlaid.server.resolver import make_resolver
from inlaid.server.safety import AllowedFolders, Keys, adapter_roots, check_config, warn_of_risks
from inlaid.server.service import Service
from inlaid.server.state import KeptAdapter, ServerState, restore
from inlaid.server.tracing import make_traces
from inlaid.server.watcher import Watcher
from inlaid.text.encoder import RequestEncoder
from inlaid.text.tokenizer import Tokenizer
from inlaid.text.tools.answer import ModelForms
from inlaid.worker import logs
from inlaid.worker.build import process_age
from inlaid.worker.checks import check_settings
from inlaid.worker.client import EngineClient
from inlaid.worker.errors import EngineDead
from inlaid.worker.interface import ServingEngine
from inlaid.worker.messages import ModelInfo

log = logging.getLogger(__name__)

_HANDSHAKE_SECONDS = 10.0  # that a client may take to agree on encryption; it counts as no connection yet
_LINGERING_SECONDS = (
    1.0  # in which the rest of a refused body is read, and inflated, so that its sender sees the answer
)
_IDLE_SECONDS = 75.0  # that a connection without a request stays open, its headers half sent included


async def make_service(
    config: ServerConfig,
    engine_config: EngineConfig,
    adapters: Mapping[str, str],
    give_up: Callable[[str], None],
    make_engine: Callable[..., ServingEngine] = EngineClient,
    **engine_options: Any,
) -> Service:
    """Make the parts of a server and start its engine. ConfigError says why it cannot."""
    keys = Keys.of(config, os.environ)
    check_config(config, keys)
    warn_of_risks(config, engine_config.scheduler.policy, engine_config.scheduler.tenant, keys)
    traces = make_traces(config.otlp_traces_endpoint)
    folders = AllowedFolders(adapter_roots(config))
    model_name = config.served_model_name or model_display_name(engine_config.model)
    names = _names(model_name, engine_config.model, adapters)
    versions = None
    first_model = engine_config.model
    if config.tasks.online_tasks:
        versions = open_versions(config.tasks, first_model)
        engine_config = replace(with_changing_base(engine_config), model=versions.current.folder)
        adapters = {**adapters_of(config.tasks, versions), **adapters}
    state = ServerState(config.state, adapters)
    engine = make_engine(
        engine_config,
        state.starting_adapters(adapters),
        on_death=config.on_engine_death,
        timeout=config.engine_timeout,
        give_up=give_up,
        environment={**logs.environment(config.log_level, config.log_format), **engine_options.pop("environment", {})},
        **engine_options,
    )
    resolver = make_resolver(config, engine, names, engine_config.adapters.max_cpu_loras)
    watchers = [Watcher(Path(folder).expanduser(), engine, names) for folder in config.lora_watch]
    model, tokenizer = await _start(engine, config.chat_template)
    online = None if versions is None else await _online(config, versions, engine, model)
    await _restore(engine, state, names, folders)
    return Service(
        config=config,
        engine=engine,
        encoder=_encoder(config, model, tokenizer, engine_config.scheduler.max_num_seqs),
        forms=ModelForms.of(tokenizer.template.source, config.tool_call_parser, config.reasoning_parser),
        metrics=Metrics(model_name, config.max_metric_adapters),
        keys=keys,
        folders=folders,
        resolver=resolver,
        watchers=watchers,
        names=names,
        model_path=first_model,
        public_path=model_name if Path(first_model).is_dir() else first_model,
        started=int(time.time()),
        state=state,
        online=online,
        traces=traces,
    )


def _encoder(config: ServerConfig, model: ModelInfo, tokenizer: Tokenizer, seats: int) -> RequestEncoder:
    """Make what turns requests into tokens, and confine the chat template to what a context can take."""
    max_model_len = min(model.max_model_len, (model.num_blocks - 1) * model.block_size)
    tokenizer.template.confine(max_model_len * tokenizer.max_token_bytes)
    text = not config.allow_special_tokens_in_messages
    return RequestEncoder(
        tokenizer, model.vocab_size, max_model_len, config.max_prompts, seats, special_tokens_are_text=text
    )


def _names(model_name: str, model: str, adapters: Iterable[str]) -> ModelNames:
    names = ModelNames(model_name, model)
    for name in adapters:
        if (why := names.why_not(name)) is not None:
            raise ConfigError(f"no adapter can be called {name!r}: {why}; rename it, or the base (--served-model-name)")
    return names


async def _restore(engine: ServingEngine, state: ServerState, names: ModelNames, folders: AllowedFolders) -> None:
    """Change the started engine as it was changed over the API before, by the rules that hold now."""

    async def load(name: str, adapter: KeptAdapter) -> None:
        if (why := names.why_not(name)) is not None:
            raise ValueError(why)
        await engine.load_adapter(name, str(folders.resolve(adapter.path)), pinned=adapter.pinned)

    try:
        await restore(state, engine.set_scheduler, load)
    except EngineDead as error:
        await engine.close()
        raise ConfigError(f"the engine died while the state of {state.path} was restored: {error}") from error
    except BaseException:
        await engine.close()
        raise


async def _online(config: ServerConfig, versions: Versions, engine: ServingEngine, model: ModelInfo) -> OnlineTasks:
    """Return what adds tasks while serving, once it is sure which version of the base is served."""
    try:
        versions.check_served(model.base_version)
        return OnlineTasks(config.tasks, versions, engine, "cpu" if model.device == "cpu" else "cuda")
    except (ValueError, OSError) as error:
        await engine.close()
        raise ConfigError(f"--online-tasks: {error}") from error


async def _start(engine: ServingEngine, template_file: str | None) -> tuple[ModelInfo, Tokenizer]:
    """Start the engine and, where the model is a folder, read its tokenizer meanwhile: importing its reader takes
    seconds."""
    template = None if template_file is None else _read_template(template_file)
    folder = engine.config.model
    reading = None
    if Path(folder).is_dir():
        reading = asyncio.create_task(asyncio.to_thread(Tokenizer, folder, template))
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # the engine's reason comes first
    try:
        model = await engine.start()
        return model, await (reading or asyncio.to_thread(Tokenizer, model.folder, template))
    except EngineDead as error:
        raise ConfigError(str(error)) from error
    except (OSError, ValueError) as error:
        await engine.close()
        raise ConfigError(str(error)) from error
    except BaseException:
        await engine.close()
        raise


def model_display_name(model: str) -> str:
    """Return a hub id as it is, a folder's name, or its parent's where that says nothing."""
    path = Path(model)
    if path.suffix == ".gguf":
        return path.stem
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
    """Bind a socket, before anything slow is done. ConfigError says why it cannot."""
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


def tls(config: ServerConfig) -> ssl.SSLContext | None:
    """Return what encrypts connections, or None. ConfigError says why the files do not do."""
    if not config.ssl_certfile and not config.ssl_keyfile:
        return None
    if not config.ssl_certfile:
        raise ConfigError("--ssl-keyfile needs --ssl-certfile, the certificate of that key")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile or None, password="")  # or it asks the terminal
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"--ssl-certfile {config.ssl_certfile} and its key cannot be used: {error}; both must be PEM files, "
            "the key without a password"
        ) from error
    return context


async def serve(
    config: ServerConfig,
    engine_config: EngineConfig,
    adapters: Mapping[str, str],
    announce: Callable[[Service, str], None],
    **engine_options: Any,
) -> int:
    """Serve until told to stop, and return the exit status. SIGTERM or SIGINT drains, a second one ends at once."""
    check(config)
    check_settings(engine_config, adapters.values())
    encryption = tls(config)
    check_origins(config.allowed_origins)
    listener = listen(config.host, config.port)
    log.info("loading %s and %d adapters", engine_config.model, len(adapters))
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
    runner = _app_runner(service)
    await runner.setup()
    assert runner.server is not None
    accept = service.connections.bounded(runner.server)
    patience = None if encryption is None else _HANDSHAKE_SECONDS
    accepting = await asyncio.get_running_loop().create_server(
        accept, sock=listener, backlog=service.connections.at_once, ssl=encryption, ssl_handshake_timeout=patience
    )
    _start_background(service)
    gc.collect()
    gc.freeze()  # what is there now stays: looking through it held up the event loop in the middle of large bodies
    host, port = listener.getsockname()[:2]
    log.info("start-up: ready %.1f s after the process began, %.1f s of them before the engine", process_age(), began)
    scheme = "http" if encryption is None else "https"
    announce(service, f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")
    status = await stop
    await service.background.close()
    if status == 0:
        await drain(service)
    accepting.close()
    await runner.cleanup()
    await service.engine.close()
    service.tokenizer.template.close()
    service.state.close()
    if service.traces is not None:
        await asyncio.to_thread(service.traces.close)
    return status


def _app_runner(service: Service) -> web.AppRunner:
    return web.AppRunner(
        make_app(service),
        handler_cancellation=True,
        access_log=None,
        logger=http_log(),
        shutdown_timeout=1.0,
        keepalive_timeout=_IDLE_SECONDS,
        lingering_time=_LINGERING_SECONDS,
    )


def _start_background(service: Service) -> None:
    for number, watcher in enumerate(service.watchers, 1):
        service.background.start(f"lora-watch {number}", partial(watcher.run, service.config.lora_watch_interval))
    if service.online is not None:
        service.background.start("online-tasks", service.online.run)


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
    """Take no new requests and let those in flight finish, for as long as configured."""
    service.draining = True
    deadline = time.monotonic() + service.config.drain_timeout
    if service.num_in_flight:
        log.warning("draining: %d requests in flight; another signal ends at once", service.num_in_flight)
    while service.num_in_flight and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    if service.num_in_flight:
        log.warning("%d requests were still in flight after %g s", service.num_in_flight, service.config.drain_timeout)
