"""Fleet: the replicas of a cluster, from start to end: added, watched, brought up to date, drained and removed.

A replica is anything with the methods of `EngineClient`: a process of this machine, or an actor that Ray placed
(`ray_app.py`). Each brings its own engine back when that dies; the fleet keeps requests away meanwhile, and opens it
again when it serves the same base and the same adapters as the others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from inlaid.cluster.images import Images
from inlaid.cluster.view import ReplicaView
from inlaid.config import EngineConfig
from inlaid.engine.refusal import Refused
from inlaid.worker.errors import EngineDead, EngineError
from inlaid.worker.interface import ReplicaState, ServingEngine
from inlaid.worker.messages import ModelInfo, ReplicaLoad

log = logging.getLogger(__name__)

_LOOK = 0.1  # seconds between two looks at the replicas
_ANSWER = 5.0  # seconds that a replica has to answer what a page shows of it


class ReplicaEngine(ServingEngine, Protocol):
    """An engine that also tells its load."""

    image: str  # a weight image for its start

    async def wait_ahead(self) -> None: ...

    def load_instead(self, config: EngineConfig, adapters: Mapping[str, str]) -> bool: ...

    @property
    def load(self) -> ReplicaLoad | None: ...


# Makes a replica: its name, the engine's configuration, its adapters, and whom to tell that it will not come back.
MakeReplica = Callable[[str, EngineConfig, Mapping[str, str], Callable[[str], None]], ReplicaEngine]


class OtherBase(EngineDead):
    """A replica serves another base than the others."""


@dataclass(eq=False)
class Replica:
    """One replica, and its state: starting, serving, draining or down."""

    name: str
    engine: ReplicaEngine
    view: ReplicaView
    state: str = "starting"
    lives: int = 0  # starts of its engine that were noticed
    busy: asyncio.Task[None] | None = field(default=None, repr=False)  # brings it up to date


class Fleet:
    """Owner of the replicas and of what all of them must serve."""

    def __init__(
        self, config: EngineConfig, adapters: Mapping[str, str], make: MakeReplica, give_up: Callable[[str], None]
    ) -> None:
        self.config = config
        self.paths = dict(adapters)
        self.scheduler: dict[str, Any] = {}  # settings that were changed while it served
        self.model: ModelInfo | None = None
        self.replicas: dict[str, Replica] = {}
        self.changing = asyncio.Lock()  # held while adapters, settings or the base change
        self.changed = asyncio.Event()  # set when a replica may have opened
        self.on_restart: Callable[[str], None] = lambda name: None
        self.warm: Callable[[Replica], Awaitable[None]] | None = None  # before a replica opens
        self.images: Images | None = None  # that new replicas start from; None: they read their files
        self.keeps_standby = False  # a process waits for the next replica, its libraries loaded
        self.last_death: str | None = None
        self._make = make
        self._give_up = give_up
        self._num_made = 0
        self._standby: tuple[str, ReplicaEngine] | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def serving(self) -> list[Replica]:
        """Replicas that take requests."""
        return [replica for replica in self.replicas.values() if replica.view.is_open]

    async def start(self, count: int) -> ModelInfo:
        """Start the first replicas. EngineDead: one of them cannot."""
        started = await asyncio.gather(*(self.add() for _ in range(count)), return_exceptions=True)
        for outcome in started:
            if isinstance(outcome, BaseException):
                await self.close()
                raise outcome
        self._watcher = asyncio.create_task(self._watch())
        assert self.model is not None
        return self.model

    async def add(self) -> Replica:
        """Start one more replica, and open it when it serves what the others serve."""
        image = await self._image()
        name, engine = await self._next()
        if image:
            engine.image = image
        view = ReplicaView(name, self.config.scheduler.max_num_seqs, self.config.adapters.max_loras, is_open=False)
        replica = self.replicas[name] = Replica(name, engine, view)
        try:
            await engine.start()
            await self._bring_up_to_date(replica)
        except BaseException:
            view.is_open = False
            await self._end(replica)
            raise
        log.info("%s serves", name)
        await self._make_standby()
        return replica

    async def _next(self) -> tuple[str, ReplicaEngine]:
        """Return the name and the engine of the next replica."""
        if self._standby is not None:
            (name, engine), self._standby = self._standby, None
            if engine.load_instead(self.config, self.paths):
                return name, engine
            log.warning("the process that waited for the next replica has ended")
            await engine.close()
        name = f"replica-{self._num_made}"
        self._num_made += 1
        return name, self._make(name, self.config, dict(self.paths), lambda reason: self._lost(name, reason))

    async def _make_standby(self) -> None:
        """Let a process wait for the next replica, once the first ones serve."""
        if self.keeps_standby and self._standby is None and all(each.view.is_open for each in self.replicas.values()):
            self._standby = await self._next()
            try:
                await self._standby[1].wait_ahead()
            except OSError as error:
                log.warning("no process waits for the next replica: %s", error)
                self._standby = None

    async def _image(self) -> str:
        """Return the path of a weight image of what the replicas serve; empty: there is none."""
        if self.images is None:
            return ""
        async with self.changing:
            for replica in self.serving:  # the first may be dead already
                if image := await self.images.of(replica.engine):
                    return image
        return ""

    async def remove(self, name: str, patience: float) -> None:
        """Drain a replica: no new requests, those that run may finish within `patience` seconds; then end it. Requests
        that still run go on elsewhere."""
        replica = self.replicas[name]
        replica.state, replica.view.is_open = "draining", False
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_until_empty(replica), patience)
        await self._end(replica)
        log.info("%s is drained", name)

    async def close(self) -> None:
        """End all replicas."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        replicas = list(self.replicas.values())
        tasks = [replica.busy for replica in replicas if replica.busy is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        standby = [] if self._standby is None else [self._standby[1]]
        await asyncio.gather(*(engine.close() for engine in [*standby, *(replica.engine for replica in replicas)]))
        if self.images is not None:
            self.images.close()

    async def _end(self, replica: Replica) -> None:
        """End a replica's process. It leaves the fleet last, so that `close` ends it if this is cancelled."""
        await replica.engine.close()
        self.replicas.pop(replica.name, None)

    async def states(self) -> list[ReplicaState]:
        """Describe the replicas, with the figures of those that answer."""
        return list(await asyncio.gather(*(_state(replica) for replica in self.replicas.values())))

    def suspect(self, replica: Replica) -> None:
        """Send a replica nothing more until it has answered: a request has found its engine dead."""
        if replica.state == "serving":
            replica.state, replica.view.is_open = "down", False

    def first(self) -> Replica:
        """Return a replica that serves. EngineDead: none does."""
        if not self.serving:
            raise EngineDead(f"no replica serves: {self.last_death or 'all are starting'}")
        return self.serving[0]

    async def ask_all(self, ask: Callable[[Replica], Awaitable[Any]]) -> list[Any]:
        """Ask all replicas that serve. One that dies meanwhile is left out; on its return it is brought up to date."""
        self.first()
        answers = await asyncio.gather(*map(ask, self.serving), return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        for error in errors:
            if not isinstance(error, EngineDead) or len(errors) == len(answers):
                raise error
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def change_all(
        self, do: Callable[[Replica], Awaitable[Any]], undo: Callable[[Replica, Any], Awaitable[Any]]
    ) -> Any:
        """Make a change on all replicas that serve and return the first's outcome; if one refuses, take it back from
        the others and raise."""
        self.first()
        replicas = self.serving
        outcomes = await asyncio.gather(*map(do, replicas), return_exceptions=True)
        done = [(r, outcome) for r, outcome in zip(replicas, outcomes) if not isinstance(outcome, BaseException)]
        failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        refused = [error for error in failed if not isinstance(error, EngineDead)]
        if refused or not done:
            for replica, outcome in done:
                try:
                    await undo(replica, outcome)
                except (EngineError, Refused) as error:
                    log.error("%s could not take a change back: %s", replica.name, error)
            raise (refused or failed)[0]
        return done[0][1]

    def _lost(self, name: str, reason: str) -> None:
        """Take a replica out whose engine does not come back; give up with the last one."""
        replica = self.replicas.pop(name, None)
        if replica is None:
            return
        replica.view.is_open = False
        self.last_death = f"{name}: {reason}"
        log.error("%s is given up: %s", name, reason)
        if not self.replicas:
            self._give_up(self.last_death)

    async def _watch(self) -> None:
        """Look at the replicas again and again: who has died, who is back, who is slow."""
        while True:
            for replica in list(self.replicas.values()):
                self._look_at(replica)
            await asyncio.sleep(_LOOK)

    def _look_at(self, replica: Replica) -> None:
        replica.view.silent = replica.engine.seconds_silent
        if replica.state == "serving" and (not replica.engine.ready or replica.engine.num_restarts != replica.lives):
            replica.state, replica.view.is_open = "down", False
            self.last_death = f"{replica.name}: {replica.engine.last_death or 'its engine has died'}"
        if replica.state == "down" and replica.engine.ready and (replica.busy is None or replica.busy.done()):
            if replica.engine.num_restarts != replica.lives:
                replica.lives = replica.engine.num_restarts
                replica.view.forget_caches()
                self.on_restart(replica.name)
            replica.busy = asyncio.create_task(self._return(replica))

    async def _return(self, replica: Replica) -> None:
        """Open a replica again whose engine is a new one."""
        try:
            await asyncio.wait_for(replica.engine.call("stats"), _ANSWER)  # its death may not have been noticed yet
            await self._bring_up_to_date(replica)
            log.warning("%s serves again", replica.name)
        except OtherBase as error:  # it was down when the others switched: one that starts now has their configuration
            log.warning("%s is replaced: %s", replica.name, error)
            await self._end(replica)
            await self.add()
        except asyncio.TimeoutError:
            log.warning("%s does not answer yet", replica.name)
        except (EngineError, Refused, OSError) as error:
            log.error("%s is not what the others are: %s", replica.name, error)
            await asyncio.sleep(1.0)

    async def _bring_up_to_date(self, replica: Replica) -> None:
        """Load and unload what changed while the replica started, check that it serves the same, and open it."""
        async with self.changing:
            engine = replica.engine
            if self.scheduler:
                await engine.set_scheduler(self.scheduler)
            for name in set(engine.adapters) - set(self.paths):
                await engine.unload_adapter(name)
            for name, path in self.paths.items():
                if name not in engine.adapters:
                    pinned = name in self.config.adapters.pin_adapter
                    await engine.load_adapter(name, path, pinned=pinned)
            model = engine.model
            assert model is not None
            if self.model is None:
                self.model = model
            elif model.base_version != self.model.base_version:
                raise OtherBase(
                    f"{replica.name} serves base {model.base_version[:12]}, the others {self.model.base_version[:12]}: "
                    "give all machines the same files"
                )
            if self.warm is not None:
                with suppress(Refused, EngineError):  # it opens cold
                    await self.warm(replica)
            replica.lives = engine.num_restarts
            replica.state, replica.view.is_open = "serving", True
        self.changed.set()


async def _until_empty(replica: Replica) -> None:
    while replica.view.size:
        await asyncio.sleep(0.02)


async def _state(replica: Replica) -> ReplicaState:
    stats: dict[str, float] = {}
    with suppress(EngineError, asyncio.TimeoutError):
        if replica.engine.ready:
            stats = await asyncio.wait_for(replica.engine.call("stats"), _ANSWER)
    return ReplicaState(
        name=replica.name,
        state=replica.state,
        requests=replica.view.size,
        restarts=replica.engine.num_restarts,
        pace=round(replica.view.pace, 2),
        stats=stats,
    )
