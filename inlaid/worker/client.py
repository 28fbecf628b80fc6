"""EngineClient: the server's side of the engine process. It starts the process, sends requests, hands each its outputs
as they come, and brings the process back, or gives up, when it dies.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from inlaid.config import EngineConfig
from inlaid.engine.limits import Acceptances
from inlaid.engine.refusal import Refusal, RefusalKind, Refused
from inlaid.engine.request import FinishReason, NewRequest, Output
from inlaid.worker import logs, messages
from inlaid.worker.errors import EngineDead, exception_of
from inlaid.worker.inbox import Inbox
from inlaid.worker.interface import ReplicaState
from inlaid.worker.link import READ_SIZE, Link
from inlaid.worker.messages import AdapterInfo, ModelInfo

log = logging.getLogger(__name__)

FACTORY = "inlaid.worker.build:build_engine"
# Modules that take long to import, for a process that waits.
AHEAD = ("inlaid.runner.floor", "inlaid.worker.bases", "inlaid.worker.images")
_HEARTBEAT = 1.0  # seconds between an answer and the next question
_LONGEST_PAUSE = 30.0  # seconds between two starts
_MAX_STARTS = 5  # that fail in a row, before the engine is given up
_ONE_ENGINE = "this server is one engine; start it with `inlaid cluster` to have replicas"
_UNKNOWN_FAILURE = Refusal("the request failed in the engine", RefusalKind.FAULT)


class EngineClient:
    """The engine process through all its lives."""

    def __init__(
        self,
        config: EngineConfig,
        adapters: Mapping[str, str] | None = None,
        *,
        on_death: str = "restart",
        timeout: float = 0.0,
        give_up: Callable[[str], None] = lambda reason: None,
        factory: str = FACTORY,
        environment: Mapping[str, str] | None = None,
        report_load: bool = False,
    ) -> None:
        self.config = config
        self.adapters: dict[str, AdapterInfo] = {}  # by name, as last heard
        self.model: ModelInfo | None = None
        self.num_restarts = 0
        self.last_death: str | None = None  # why, until it is back
        self.image = ""  # a weight image for the first life; later ones read their files
        self._paths = dict(adapters or {})
        self._scheduler: dict[str, Any] = {}  # settings that were changed while it served
        self._accepted = Acceptances()
        self._on_death = on_death
        self._timeout = timeout  # seconds without an answer after which the process is taken for dead; 0: never
        self._give_up = give_up
        self._report_load = report_load
        self._factory = factory
        self._environment = {"PYTHONPATH": _import_path(), **(environment or {})}
        self._link: Link | None = None
        self._asked_at: float | None = None  # when the question was sent that waits for its answer
        self._keeper: asyncio.Task[None] | None = None
        self._closing = False
        self._numbers = itertools.count(1)
        self._staged: tuple[str, dict[str, str]] = ("", {})  # folder and adapters of the base that is staged
        self._querying = asyncio.Lock()
        self._num_queries = 0  # for all adapters, begun
        self._last_query = 0  # the last that was answered, and what it found
        self._listed: list[AdapterInfo] = []

    @property
    def ready(self) -> bool:
        """True while the process serves."""
        return self._link is not None and self._link.serves

    @property
    def seconds_silent(self) -> float:
        """The seconds that the process has owed an answer to the last heartbeat."""
        return 0.0 if self._asked_at is None else time.monotonic() - self._asked_at

    @property
    def load(self) -> messages.ReplicaLoad | None:
        """The engine's state as its answers last told, if they were asked to."""
        return None if self._link is None else self._link.load

    @property
    def process_id(self) -> int | None:
        """The process, if it runs."""
        return None if self._link is None or self._link.process is None else self._link.process.pid

    @property
    def num_requests(self) -> int:
        """Count the requests that are waited for."""
        return 0 if self._link is None else len(self._link.inboxes)

    async def start(self) -> ModelInfo:
        """Start the process and wait until it serves. EngineDead says why it cannot."""
        link = self._link = self._link or Link()
        self._keeper = asyncio.create_task(self._keep(link))
        self._keeper.add_done_callback(self._kept)
        ready = await asyncio.shield(link.ready)
        return ready.model

    async def wait_ahead(self) -> None:
        """Start the process before it is known what it is to load: it imports what takes long, and waits."""
        self._link = Link()
        await self._link.wait_ahead(self._environment, AHEAD if self._factory == FACTORY else ())

    def load_instead(self, config: EngineConfig, adapters: Mapping[str, str]) -> bool:
        """Say, before `start`, what is to be loaded. False: the process that waits has ended."""
        self.config, self._paths = config, dict(adapters)
        return self._link is not None and self._link.runs

    async def generate(self, request: NewRequest, timeout: float = 0.0) -> AsyncGenerator[Output, None]:
        """Yield outputs until one has a finish_reason. A request that is left early is aborted, so close the generator:
        `async with aclosing(engine.generate(…))`. Raises Refused, RequestTimeout, EngineDead and EngineError."""
        link = self._live()
        inbox = link.inboxes[request.id] = Inbox()
        over = False
        timer = inbox.fail_after(timeout) if timeout > 0 else None
        try:
            await link.submit(messages.Add(request=request))
            while not over:
                output = await inbox.get()
                over = output.finish_reason is not None
                if output.finish_reason is FinishReason.ERROR:
                    raise exception_of(output.refusal or _UNKNOWN_FAILURE)
                yield output
        except EngineDead:
            over = True
            raise
        except ConnectionError as error:
            raise EngineDead("the engine process has closed its connection") from error
        finally:
            if timer is not None:
                timer.cancel()
            del link.inboxes[request.id]
            if not over:
                link.send(messages.Abort(id=request.id))

    def stop(self, request_id: str, num_tokens: int) -> None:
        """End a request whose answer is whole: a stop string was found so many tokens in. Later tokens are not charged,
        even if the engine has ended the request by itself."""
        if self._link is not None:
            self._link.send(messages.Abort(id=request_id, reason=FinishReason.STOP, num_tokens=num_tokens))

    async def call(self, method: str, /, **arguments: Any) -> Any:
        """Call a method of `calls.Queries` in the process. Raises Refused and EngineDead."""
        try:
            return await self._live().ask(next(self._numbers), method, arguments)
        except messages.Unsendable as error:
            raise Refused(Refusal(str(error))) from error

    async def set_scheduler(self, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Change settings of the scheduler, also for the next lives of the process. Return the description of all
        settings, and those that have been changed since the first life began."""
        described = await self.call("set_scheduler", changes=changes)
        names = {*self._scheduler, *changes}
        names |= {"policy", "options"} if names & {"policy", "options"} else set()
        self._scheduler = {name: described[name] for name in sorted(names)}
        return described, self._scheduler

    async def load_adapter(
        self, name: str, path: str, in_place: bool = False, pinned: bool | None = None
    ) -> AdapterInfo:
        """Serve an adapter from a folder; with in_place it may replace one of that name. A pinned one stays on the
        device (None: as it was, or as the configuration says)."""
        value = await self.call("load_adapter", name=name, path=path, in_place=in_place, pinned=pinned)
        info = msgspec.convert(value, AdapterInfo)
        self.adapters[name] = info
        self._paths[name] = path
        self._remember_pin(name, info.pinned)
        log.info("adapter is served", extra=logs.fields(adapter=name, path=path, identity=info.identity[:12]))
        return info

    async def pin_adapter(self, name: str, pinned: bool) -> AdapterInfo:
        """Keep an adapter on the device from when it is there, or no longer."""
        info = msgspec.convert(await self.call("pin_adapter", name=name, pinned=pinned), AdapterInfo)
        self.adapters[name] = info
        self._remember_pin(name, info.pinned)
        return info

    def _remember_pin(self, name: str, pinned: bool) -> None:
        """Change what the next life of the process pins."""
        others = tuple(other for other in self.config.adapters.pin_adapter if other != name)
        adapters = replace(self.config.adapters, pin_adapter=(*others, name) if pinned else others)
        self.config = replace(self.config, adapters=adapters)

    async def unload_adapter(self, name: str) -> int:
        """Forget an adapter at once, and return how many requests still run on it."""
        in_flight = int(await self.call("unload_adapter", name=name))
        self.adapters.pop(name, None)
        self._paths.pop(name, None)
        self._remember_pin(name, False)
        log.info("adapter is unloaded", extra=logs.fields(adapter=name, in_flight=in_flight))
        return in_flight

    async def until_unloaded(self, adapter: AdapterInfo, in_flight: int) -> int:
        """Wait until no request runs on an adapter that was unloaded, as long as a request may wait for one. Return
        `in_flight` if some still do."""
        patience = self.config.adapters.adapter_timeout
        try:
            await asyncio.wait_for(self.call("until_unloaded", identity=adapter.identity), patience)
        except asyncio.TimeoutError:
            return in_flight
        except EngineDead:
            pass  # and the requests with it
        return 0

    async def stage_base(self, folder: str, version: str, where: str, adapters: Mapping[str, str], rest: float) -> Any:
        """Bring another base into the engine's memory, with adapters that come with it; nothing that is served changes.
        Refused says why it cannot be served."""
        arguments = {"folder": folder, "version": version, "where": where, "adapters": dict(adapters), "rest": rest}
        staged = await self.call("stage_base", **arguments)
        self._staged = (folder, dict(adapters))
        return staged

    async def switch_base(self, version: str, rule: str) -> dict[str, Any]:
        """Serve the staged base from the next step on, in later lives of the process too."""
        outcome: dict[str, Any] = await self.call("switch_base", version=version, rule=rule)
        folder, adapters = self._staged
        self.config = replace(self.config, model=folder)
        if self.model is not None:
            self.model = msgspec.structs.replace(self.model, folder=folder, base_version=version)
        self._paths = {**adapters, **self._paths}
        await self.list_adapters()
        return outcome

    async def unstage_base(self) -> None:
        """Forget what is staged."""
        await self.call("unstage_base")

    async def list_adapters(self) -> list[AdapterInfo]:
        """Return all adapters. Coalesce concurrent calls into one engine query: those that come while it runs share the
        next one."""
        came = self._num_queries
        async with self._querying:
            if self._last_query <= came:
                number = self._num_queries = self._num_queries + 1
                listed = msgspec.convert(await self.call("adapters"), list[AdapterInfo])
                self.adapters = {info.name: info for info in listed}
                self._listed, self._last_query = listed, number
            return self._listed

    async def describe_adapter(self, name: str) -> AdapterInfo:
        """Return one adapter. Refused: there is none of that name."""
        return msgspec.convert(await self.call("adapter", name=name), AdapterInfo)

    @property
    def replica_states(self) -> dict[str, str]:
        """Return no replicas: this is one engine."""
        return {}

    async def replicas(self) -> list[ReplicaState]:
        """Return no replicas: this is one engine."""
        return []

    async def add_replica(self) -> str:
        """Refuse: this is one engine."""
        raise Refused(Refusal(_ONE_ENGINE))

    async def drain_replica(self, name: str) -> None:
        """Refuse: this is one engine."""
        raise Refused(Refusal(_ONE_ENGINE))

    async def close(self) -> None:
        """End the process; requests in flight fail."""
        self._closing = True
        link, keeper = self._link, self._keeper
        if link is not None:
            link.fail(EngineDead("the server is shutting down"))
            await link.close()
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    def kill(self) -> None:
        """End the process now."""
        self._closing = True
        if self._link is not None:
            self._link.kill()

    def _live(self) -> Link:
        if self._link is None or not self.ready:
            because = f": {self.last_death}" if self.last_death else ""
            raise EngineDead(f"the engine is not ready{because}")
        return self._link

    def _kept(self, keeper: asyncio.Task[None]) -> None:
        """Give up if following the process failed: nothing would start it again."""
        if not keeper.cancelled() and (error := keeper.exception()) is not None:
            log.error("following the engine process failed", exc_info=error)
            self.kill()
            if self._link is not None:
                self._link.fail(EngineDead(f"following the engine process failed: {error!r}"))
            self._give_up(f"following the engine process failed: {error!r}")

    async def _keep(self, link: Link) -> None:
        """Follow the process through its lives."""
        num_failed = 0
        strict = True
        while True:
            reason = await self._live_once(link, strict)
            if self._closing:
                return
            if link.serves:
                num_failed = 0
            elif link.process is not None:  # without descriptors or memory no process was started at all
                num_failed += 1
            first = strict and not link.serves
            self.last_death = reason
            self._link = None
            link.fail(EngineDead(reason))
            strict = False
            if first:
                return  # start() raises
            log.error("%s", reason)
            if self._on_death == "exit" or num_failed >= _MAX_STARTS:
                self._give_up(reason)
                return
            await asyncio.sleep(max(link.process is None, min(_LONGEST_PAUSE, 2.0**num_failed - 1)))
            self.num_restarts += 1
            log.warning("starting the engine process again", extra=logs.fields(changed=self._scheduler or None))
            link = self._link = Link()

    async def _live_once(self, link: Link, strict: bool) -> str:
        """Live one life of the process from start to death, and return why it ended."""
        start = messages.Start(
            config=self.config,
            adapters=dict(self._paths),
            factory=self._factory,
            strict=strict,
            scheduler=self._scheduler,
            accepted=self._accepted.export(time.monotonic()),
            window=self._accepted.longest_window,
            report_load=self._report_load,
            image=self.image,
        )
        self.image = ""
        framing = messages.Framing(messages.Event)
        watch = asyncio.create_task(self._watch(link))
        try:
            reader = await link.open(start, self._environment)
            while data := await reader.read(READ_SIZE):
                for event in framing.feed(data):
                    if isinstance(event, messages.Ready):
                        self._welcome(event)
                    elif isinstance(event, messages.Accepted):
                        self._accepted.note(event.tenant, event.when, event.window)
                    link.receive(event)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.error("the connection to the engine process broke", exc_info=error)
        finally:
            watch.cancel()
        await link.close()
        status = None if link.process is None else link.process.returncode
        return link.fatal or f"the engine process ended with status {status}"

    async def _watch(self, link: Link) -> None:
        """Ask the process again and again whether it answers, and end one that has stopped to, so that it is treated
        like any other dead one."""
        try:
            await asyncio.shield(link.ready)
            while True:
                self._asked_at = None
                await asyncio.sleep(min(_HEARTBEAT, self._timeout / 4 or _HEARTBEAT))
                self._asked_at = time.monotonic()
                await asyncio.wait_for(link.ask(next(self._numbers), "stats", {}), self._timeout or None)
        except asyncio.TimeoutError:
            link.fatal = f"the engine process has not answered for {self._timeout:g} s"
            link.kill()
        except EngineDead:
            pass  # it has ended by itself

    def _welcome(self, ready: messages.Ready) -> None:
        self.model = ready.model
        self.adapters = {info.name: info for info in ready.adapters}
        self.last_death = None
        for name, reason in ready.left_out.items():
            log.error("adapter %s is left out: %s", name, reason)
            self._paths.pop(name, None)


def _import_path() -> str:
    """Return where this process found inlaid and other packages, so that the child finds the same."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
