"""Adapters and the scheduler, seen and changed while serving. Changing needs the admin key; loading must be switched on
and is confined to allow-listed folders.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from inlaid.server.completions import answer
from inlaid.server.errors import BadRequest, Conflict, Forbidden, NotFound, TooMany
from inlaid.server.protocol.admin import (
    AdapterCard,
    AdapterList,
    LoadAdapterBody,
    MeasuredLoad,
    MeasuredStep,
    SchedulerBody,
    StepList,
    UnloadAdapterBody,
)
from inlaid.server.protocol.console import ChangeAdapterBody, ChangedAdapter
from inlaid.server.protocol.sglang import LoadResult
from inlaid.server.safety import check_tenants
from inlaid.server.service import SERVICE, Service
from inlaid.text.nesting import check_depth
from inlaid.worker import logs

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_MAX_LOADS = 32  # waiting or under way


async def list_adapters(request: web.Request) -> web.Response:
    """List every adapter with its rank, bytes and residency."""
    service = request.app[SERVICE]
    engine, paths = service.engine, service.keys.opens_paths(request.headers)
    listed = await engine.list_adapters()
    shown = listed if paths else [msgspec.structs.replace(info, path=info.name) for info in listed]
    cards = [msgspec.convert(info, AdapterCard, from_attributes=True) for info in shown]
    assert engine.model is not None
    return answer(AdapterList(adapters=cards, max_loras=engine.model.max_loras))


async def load_adapter(request: web.Request, body: LoadAdapterBody) -> web.Response:
    """Load an adapter from one of the allowed folders."""
    await finish(request, _load(request, body))
    return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' added successfully")


async def unload_adapter(request: web.Request, body: UnloadAdapterBody) -> web.Response:
    """Forget an adapter and answer when the requests that run on it have finished."""
    in_flight = await finish(request, _unload(request, body))
    more = f"; {in_flight} requests still run on it, and its memory goes with the last" if in_flight else ""
    return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' removed successfully{more}")


async def load_adapter_sglang(request: web.Request, body: LoadAdapterBody) -> web.Response:
    """Load an adapter; SGLang's path and answer."""
    await finish(request, _load(request, body))
    return answer(LoadResult(loaded_adapters=_paths(request.app[SERVICE])))


async def unload_adapter_sglang(request: web.Request, body: UnloadAdapterBody) -> web.Response:
    """Forget an adapter; SGLang's path and answer."""
    await finish(request, _unload(request, body))
    return answer(LoadResult(loaded_adapters=_paths(request.app[SERVICE])))


async def change_adapter(request: web.Request, body: ChangeAdapterBody) -> web.Response:
    """Pin an adapter to the device, let it go, or drain it: then it takes no new requests."""
    return answer(await finish(request, _change(request, body)))


async def get_scheduler(request: web.Request) -> web.Response:
    """Return the policy in force, its options, weights and limits."""
    return answer(await request.app[SERVICE].engine.call("scheduler"))


async def put_scheduler(request: web.Request, body: SchedulerBody) -> web.Response:
    """Change policy, options, weights or limits; all or nothing, and no request is dropped."""
    changes = {name: value for name, value in msgspec.structs.asdict(body).items() if value is not None}
    for name, value in changes.items():
        check_depth(name, value)
    service = request.app[SERVICE]
    for name in {"weights", "limits"} & changes.keys():
        kind = service.engine.config.scheduler.tenant
        if kind != "adapter" or service.resolver is None:  # a resolver may still find an adapter of any name
            check_tenants(kind, service.keys, service.engine.adapters, changes[name], name)
    return answer(await finish(request, _set_scheduler(request, changes)))


async def fairness(request: web.Request) -> web.Response:
    """Return the service per tenant in the last `window` seconds, gaps, and who waits."""
    try:
        window = float(request.query.get("window", "60"))
        return answer(await request.app[SERVICE].engine.call("fairness", window=window))
    except ValueError as error:
        raise BadRequest(str(error), "window") from error


async def list_steps(request: web.Request) -> web.Response:
    """List the last steps that were measured, and the last load of each adapter: what a cost model is fitted to."""
    engine = request.app[SERVICE].engine
    steps = msgspec.convert(await engine.call("steps"), list[MeasuredStep])
    loads = [
        MeasuredLoad(rank=info.rank, read_seconds=info.load_seconds, copy_seconds=info.copy_seconds)
        for info in await engine.list_adapters()
    ]
    return answer(StepList(steps=steps, loads=loads))


async def finish(request: web.Request, change: Awaitable[_T]) -> _T:
    """Carry a change through, even if the client that asked for it leaves."""
    return await request.app[SERVICE].state.finish(change)


async def _set_scheduler(request: web.Request, changes: dict[str, Any]) -> dict[str, Any]:
    service = request.app[SERVICE]
    try:
        described, changed = await service.engine.set_scheduler(changes)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    log.info("the scheduler is changed", extra=logs.fields(by=_who(request), **changes))
    await service.state.note_scheduler(changed)
    return described


def _who(request: web.Request) -> str:
    """Name the client that changes something. There is one admin key, so its address is what tells."""
    return f"admin key, {request.remote}"


def _check_on(service: Service) -> None:
    if not service.config.allow_runtime_lora:
        raise Forbidden("loading and unloading adapters while serving is off; start with --allow-runtime-lora")


async def _load(request: web.Request, body: LoadAdapterBody) -> None:
    _check_on(request.app[SERVICE])
    folder = request.app[SERVICE].folders.resolve(body.lora_path)
    await load_folder(request, body.lora_name, folder, bool(body.load_inplace), body.pinned)


async def load_folder(request: web.Request, name: str, folder: Path, in_place: bool, pinned: bool | None) -> None:
    """Load an adapter from a folder that adapters may come from, and keep that it was loaded."""
    service = request.app[SERVICE]
    if (why := service.names.why_not(name)) is not None:
        raise BadRequest(f"{name!r} cannot be an adapter's name: {why}", "lora_name")
    loaded = Conflict(f"adapter {name!r} is loaded already; unload it first or set load_inplace", "lora_name")
    if name in service.engine.adapters and not in_place:
        raise loaded
    if service.num_loads >= _MAX_LOADS:
        raise TooMany(f"{service.num_loads} adapters are being loaded already", retry_after=5)
    service.num_loads += 1
    try:
        info = await service.engine.load_adapter(name, str(folder), in_place, pinned)
    except ValueError as error:
        if name in service.engine.adapters and not in_place:  # another one was first
            raise loaded from error
        raise BadRequest(str(error), "lora_path") from error
    finally:
        service.num_loads -= 1
    log.info("an adapter is loaded", extra=logs.fields(by=_who(request), adapter=name, pinned=info.pinned))
    await service.state.note_loaded(name, str(folder), info.pinned)


async def _change(request: web.Request, body: ChangeAdapterBody) -> ChangedAdapter:
    service, name = request.app[SERVICE], body.lora_name
    if name not in service.engine.adapters:
        raise NotFound(f"adapter {name!r} is not loaded", "lora_name", "model_not_found")
    draining = service.draining_adapters
    if body.pinned is None:
        info = await service.engine.describe_adapter(name)
    else:
        try:
            info = await service.engine.pin_adapter(name, body.pinned)
        except ValueError as error:
            raise BadRequest(str(error), "pinned") from error
    if body.draining is not None:
        (draining.add if body.draining else draining.discard)(name)
    log.info("an adapter is changed", extra=logs.fields(by=_who(request), **msgspec.structs.asdict(body)))
    if body.pinned is not None and name in service.state.kept.loaded:  # others are named by the command line
        await service.state.note_loaded(name, info.path, info.pinned)
    return ChangedAdapter(lora_name=name, pinned=info.pinned, draining=name in draining, requests=info.requests)


async def _unload(request: web.Request, body: UnloadAdapterBody) -> int:
    """Wait for the requests of an adapter as long as one may wait for it; return how many there still are."""
    service, name = request.app[SERVICE], body.lora_name
    _check_on(service)
    known = service.engine.adapters.get(name)
    if known is None and name not in service.state.kept.loaded:
        raise NotFound(f"adapter {name!r} is not loaded", "lora_name", "model_not_found")
    try:
        in_flight = 0 if known is None else await service.engine.unload_adapter(name)
    except ValueError as error:
        if name not in service.engine.adapters:  # another one was first
            raise NotFound(str(error), "lora_name", "model_not_found") from error
        raise BadRequest(str(error), "lora_name") from error
    log.info("an adapter is unloaded", extra=logs.fields(by=_who(request), adapter=name))
    service.draining_adapters.discard(name)
    await service.state.note_unloaded(name)
    if in_flight and known is not None:
        in_flight = await service.engine.until_unloaded(known, in_flight)
    return in_flight


def _paths(service: Service) -> dict[str, str]:
    return {info.name: info.path for info in service.engine.adapters.values()}
