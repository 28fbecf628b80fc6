"""Scaler: adds and drains replicas of a fleet as a planner says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, Protocol

from inlaid.cluster.fleet import Fleet
from inlaid.cluster.planner import Demand, Load, Planner
from inlaid.worker.errors import EngineError

log = logging.getLogger(__name__)

_INTERVAL = 0.5  # seconds between two plans
_PAUSE = 10.0  # seconds after a replica that could not start
_PATIENCE = 60.0  # seconds that a replica's requests have before they go on elsewhere


class Loop(Protocol):
    """A task that runs beside the serving, from its start to its end."""

    def start(self) -> None: ...

    async def close(self) -> None: ...


class Scaler:
    """The loop between planner and fleet. One change at a time in each direction."""

    def __init__(self, planner: Planner, fleet: Fleet, demand: Demand) -> None:
        self.wanted = 0
        self._planner = planner
        self._fleet = fleet
        self._demand = demand
        self._loop: asyncio.Task[None] | None = None
        self._pause_until = 0.0  # no replica is added before, as the last could not be
        self._changes: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to plan."""
        self._loop = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Plan no more."""
        tasks = [*self._changes, *([] if self._loop is None else [self._loop])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL)
            self._plan()

    def _plan(self) -> None:
        alive = [each for each in self._fleet.replicas.values() if each.state != "draining"]
        views = [each.view for each in alive if each.view.is_open]
        loads = [each.engine.load for each in alive]
        load = Load(
            replicas=len(alive),
            waiting_tokens=sum(view.waiting_tokens for view in views),
            used_blocks=sum(each.blocks - each.free_blocks for each in loads if each is not None),
            requests=self._demand.requests,
            prompt_tokens=self._demand.prompt_tokens,
            answer=self._demand.answer,
        )
        self.wanted = self._planner.wanted(load, views, time.monotonic())
        missing = 0 if time.monotonic() < self._pause_until else self.wanted - len(alive)
        for _ in range(missing):
            self._begin(self._add())
        if self.wanted < len(alive) and len(views) > 1 and len(views) == len(alive):
            least = min(views, key=lambda view: view.size)
            self._begin(self._fleet.remove(least.name, _PATIENCE))

    def _begin(self, change: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    async def _add(self) -> None:
        try:
            await self._fleet.add()
        except (EngineError, ValueError, OSError) as error:
            log.error("no replica could be added: %s", error)
            self._pause_until = time.monotonic() + _PAUSE
