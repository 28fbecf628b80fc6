"""Changes of what replicas serve, made on all of them or on none. The caller holds `fleet.changing`."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

from inlaid.cluster.fleet import Fleet, Replica
from inlaid.engine.refusal import Refusal, Refused
from inlaid.worker.messages import AdapterInfo

log = logging.getLogger(__name__)


async def set_scheduler(fleet: Fleet, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Change settings of the schedulers; return the description and all that was changed so far."""
    before = await fleet.first().engine.call("scheduler")
    names = {*changes, *(("policy", "options") if "policy" in changes else ())}
    undo = {name: before[name] for name in names & before.keys()}
    described, changed = await fleet.change_all(
        lambda replica: replica.engine.set_scheduler(changes),
        lambda replica, done: replica.engine.set_scheduler(undo),
    )
    fleet.scheduler = changed
    return described, changed


async def load_adapter(fleet: Fleet, name: str, path: str, in_place: bool, pinned: bool | None) -> AdapterInfo:
    """Load an adapter; replicas that read different weights refuse."""
    before = fleet.paths.get(name)
    infos: list[AdapterInfo] = []

    async def undo(replica: Replica, done: AdapterInfo) -> None:
        if before is None:
            await replica.engine.unload_adapter(name)
        else:
            await replica.engine.load_adapter(name, before, True)

    async def load(replica: Replica) -> AdapterInfo:
        info = await replica.engine.load_adapter(name, path, in_place, pinned)
        infos.append(info)
        if info.identity != infos[0].identity:
            await undo(replica, info)
            raise Refused(Refusal(f"{path} holds other weights on {replica.name}: give all machines the same"))
        return info

    info: AdapterInfo = await fleet.change_all(load, undo)
    fleet.paths[name] = path
    remember_pin(fleet, name, info.pinned)
    return info


async def switch_base(fleet: Fleet, version: str, rule: str) -> dict[str, Any]:
    """Serve the staged base. A switch cannot be taken back at once, so a replica that does not switch while others do
    is closed, and replaced by one that serves the new base."""
    replicas = fleet.serving
    done = await asyncio.gather(*(each.engine.switch_base(version, rule) for each in replicas), return_exceptions=True)
    switched = [
        (replica, outcome) for replica, outcome in zip(replicas, done) if not isinstance(outcome, BaseException)
    ]
    if not switched:
        raise next(outcome for outcome in done if isinstance(outcome, BaseException))
    for replica, outcome in zip(replicas, done):
        if isinstance(outcome, BaseException):
            log.error("%s has not switched to base %s: %s", replica.name, version[:12], outcome)
            replica.state, replica.view.is_open = "down", False
    first, outcome = switched[0]
    fleet.config, fleet.model = replace(fleet.config, model=first.engine.config.model), first.engine.model
    fleet.paths = {**{info.name: info.path for info in first.engine.adapters.values()}, **fleet.paths}
    return outcome


def remember_pin(fleet: Fleet, name: str, pinned: bool) -> None:
    """Change what replicas that start later pin."""
    others = tuple(other for other in fleet.config.adapters.pin_adapter if other != name)
    adapters = replace(fleet.config.adapters, pin_adapter=(*others, name) if pinned else others)
    fleet.config = replace(fleet.config, adapters=adapters)
