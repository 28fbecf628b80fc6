"""The console's routes: the page at /, its files, its stream of state, an adapter's details and the what-if."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import msgspec
from aiohttp import web

from inlaid.console import what_if
from inlaid.console.feed import Level, TooManyViewers
from inlaid.console.static import HEADERS, PageFile, read_files
from inlaid.engine.policy import parse_policy
from inlaid.engine.step_log import Step
from inlaid.server.completions import answer
from inlaid.server.console_state import ConsoleState
from inlaid.server.errors import ApiError, BadRequest, NotFound, TooMany
from inlaid.server.protocol.console import WhatIfAnswer, WhatIfBody
from inlaid.server.route import Guard, Route
from inlaid.server.service import SERVICE, Service
from inlaid.server.streaming import send

_NOT_REPLAYED = ("policy", "predictor", "predictor_file", "tenant", "max_num_waiting")  # of the scheduler's settings

CONSOLE: web.AppKey[ConsoleState] = web.AppKey("console", ConsoleState)
FILES: web.AppKey[Mapping[str, PageFile]] = web.AppKey("console files", dict)
REPLAYING: web.AppKey[asyncio.Lock] = web.AppKey("replaying", asyncio.Lock)


def add_console(app: web.Application, service: Service) -> None:
    """Let an application have the console's parts, and gather its state while the server runs."""
    app[CONSOLE] = ConsoleState(service)
    app[FILES] = read_files()
    app[REPLAYING] = asyncio.Lock()

    async def start(app: web.Application) -> None:
        service.background.start("console", app[CONSOLE].run)

    app.on_startup.append(start)


async def page(request: web.Request) -> web.Response:
    """Show the console."""
    return _sent(request, "index.html")


async def file(request: web.Request) -> web.Response:
    """Return a script, a style or an image of the console."""
    return _sent(request, request.match_info["path"])


def _sent(request: web.Request, path: str) -> web.Response:
    found = request.app[FILES].get(path)
    if found is None:
        raise NotFound("the console has no such file")
    headers = {**HEADERS, "ETag": found.tag}
    if found.tag in request.headers.get("If-None-Match", ""):
        return web.Response(status=304, headers=headers)
    packed = "gzip" in request.headers.get("Accept-Encoding", "")
    if packed:
        headers["Content-Encoding"] = "gzip"
    return web.Response(body=found.packed if packed else found.plain, headers={**headers, "Content-Type": found.kind})


async def events(request: web.Request) -> web.StreamResponse:
    """Stream the state of the server: the whole, and then once a second what has changed."""
    service, console = request.app[SERVICE], request.app[CONSOLE]
    if request.method == "HEAD":
        return web.Response(content_type="text/event-stream")
    try:
        async with aclosing(console.feed.follow(_level(service, request.headers))) as feed:
            return await send(request, feed, service.config.stream_timeout, done=b"")
    except TooManyViewers as error:
        raise TooMany(str(error), retry_after=10) from None


def _level(service: Service, headers: Mapping[str, str]) -> Level:
    """Return how much a client may see; the route's guard has found its key good for inference."""
    try:
        service.keys.check_admin(headers)
        return Level.ADMIN
    except ApiError:
        return Level.READER if service.keys.has_admin else Level.OPERATOR


async def adapter(request: web.Request) -> web.Response:
    """Describe an adapter: its modules with ranks, its latency over time and its last cold start."""
    service, name = request.app[SERVICE], request.match_info["name"]
    if name not in service.engine.adapters:
        raise NotFound(f"adapter {name!r} is not loaded", "name", "model_not_found")
    info = await service.engine.describe_adapter(name)
    one = service.metrics.traffic.by_adapter.get(name)
    found: dict[str, Any] = {
        "name": name,
        "identity": info.identity,
        "parts": await service.engine.call("adapter_parts", name=name),
        "history": [] if one is None else list(one.history),
        "cold_start": request.app[CONSOLE].cold_starts.get(name),
    }
    return answer(found)


async def replay(request: web.Request, body: WhatIfBody) -> web.Response:
    """Replay the last minutes in the simulator under other settings, and under those in force."""
    lock = request.app[REPLAYING]
    if lock.locked():
        raise TooMany("a replay is under way already; wait for it", retry_after=5)
    async with lock:
        question = await _question(request.app[SERVICE], body)
        try:
            outcome = await what_if.ask(question)
        except what_if.WhatIfError as error:
            raise BadRequest(str(error)) from error
    return answer(WhatIfAnswer(**msgspec.structs.asdict(outcome)))


async def _question(service: Service, body: WhatIfBody) -> what_if.Question:
    engine, model = service.engine, service.engine.model
    assert model is not None
    described = await engine.call("scheduler")
    if body.policy is not None:
        try:
            parse_policy(body.policy)
        except ValueError as error:
            raise BadRequest(str(error), "policy") from error
    config = engine.config.scheduler
    listed = await engine.list_adapters()
    copies = [info.copy_seconds for info in listed if info.copy_seconds]
    return what_if.Question(
        served=service.metrics.traffic.last(60 * body.minutes, time.monotonic())[-what_if.MOST_REQUESTS :],
        steps=msgspec.convert(await engine.call("steps"), list[Step]),
        ranks={info.name: info.rank for info in listed},
        copy_seconds=sum(copies) / len(copies) if copies else 0.0,
        block_size=model.block_size,
        max_model_len=model.max_model_len,
        scheduler={name: value for name, value in asdict(config).items() if name not in _NOT_REPLAYED},
        choices=_choices(body, described, model.max_loras, (model.num_blocks - 1) * model.block_size),
    )


def _choices(body: WhatIfBody, described: dict[str, Any], slots: int, kv_tokens: int) -> list[what_if.Choice]:
    """Return the settings in force, and those that are asked about."""
    policy = ",".join(f"{key}={value}" for key, value in described["options"].items())
    policy = f"{described['policy']}:{policy}" if policy else described["policy"]
    now = what_if.Choice(
        label="in force", policy=policy, weights=described["weights"], slots=slots, kv_tokens=kv_tokens
    )
    found = [now]
    if body.policy is not None or body.weights is not None:
        weights = now.weights if body.weights is None else body.weights
        label = body.policy or f"{described['policy']}, other weights"
        found.append(msgspec.structs.replace(now, label=label, policy=body.policy or policy, weights=weights))
    for count in body.slots or ():
        found.append(msgspec.structs.replace(now, label=f"{count} adapters on the device", slots=count))
    for count in body.kv_tokens or ():
        found.append(msgspec.structs.replace(now, label=f"KV for {count} tokens", kv_tokens=count))
    return found


CONSOLE_ROUTES = (
    Route("GET", "/", page, Guard.OPEN, text="text/html"),
    Route("GET", "/console/files/{path:.+}", file, Guard.OPEN, text="text/javascript"),
    Route("GET", "/console/events", events, text="text/event-stream"),
    Route("GET", "/console/adapters/{name:.+}", adapter, answers=(dict[str, Any],)),
    Route("POST", "/console/what-if", replay, Guard.OPERATOR, WhatIfBody, (WhatIfAnswer,)),
)
