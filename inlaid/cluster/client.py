"""ClusterClient: many replicas behind the methods of one engine. The server's routes use it as they use `EngineClient`.

It places each request (`placement.py`), follows it, and moves it when its replica dies: a request without output starts
elsewhere, a stream goes on elsewhere from its tokens. Noise depends on the request's seed and the position alone, so
the answer is that of an undisturbed run. Changes (adapters, settings, base) are made on all replicas or on none.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any

import msgspec

from inlaid.cluster.changes import load_adapter, remember_pin, set_scheduler, switch_base
from inlaid.cluster.fleet import Fleet, MakeReplica, Replica
from inlaid.cluster.front_limits import FrontLimits
from inlaid.cluster.merge import MERGED, merge_adapter, merge_adapters
from inlaid.cluster.placement import Placement, Predicted
from inlaid.cluster.planner import Demand
from inlaid.cluster.scaler import Loop
from inlaid.cluster.shares import Shares
from inlaid.cluster.view import Ask, prefix_keys
from inlaid.config import EngineConfig
from inlaid.engine.intake import make_cost
from inlaid.engine.refusal import Refusal, RefusalKind, Refused
from inlaid.engine.request import NewRequest, Output, SamplingParams
from inlaid.worker.errors import EngineDead, EngineError, RequestTimeout
from inlaid.worker.interface import ReplicaState
from inlaid.worker.messages import AdapterInfo, ModelInfo

log = logging.getLogger(__name__)

_MAX_LIVES = 3  # replicas that may die under one request before it is taken for the cause
_PATIENCE = 60.0  # seconds that a request waits for any replica to serve
_ASK_AGAIN = 0.05  # seconds until a placement that named no replica is asked again
_TELL = 0.1  # seconds between two messages of service elsewhere
_DRAIN = 30.0  # seconds that a replica's requests have to finish before it is removed
_ON_ALL = frozenset({"flush_cache", "start_profile", "stop_profile", "set_scheduler"})


class ClusterClient:
    """All replicas, as one engine."""

    def __init__(
        self,
        config: EngineConfig,
        adapters: Mapping[str, str] | None = None,
        *,
        make: MakeReplica,
        placement: Placement,
        count: int,
        resume: bool = True,
        give_up: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.fleet = Fleet(config, adapters or {}, make, give_up)
        self.adapters: dict[str, AdapterInfo] = {}
        self.loops: list[Loop] = []  # run while it serves: the scaler, the pricer
        self.num_moved = 0  # requests that another replica took over
        self.demand = Demand()
        self._placement = placement
        self._count = count
        self._resume = resume  # a stream whose replica dies goes on elsewhere, or ends with an error
        self._shares = Shares()
        self._limits = FrontLimits(config.scheduler.policy)
        self._cost = make_cost(config.scheduler)
        self._front = secrets.token_hex(8)
        self._at: dict[str, Replica] = {}  # where each request is
        self._closing = False
        self._teller: asyncio.Task[None] | None = None
        self.fleet.on_restart = self._shares.restart
        self.fleet.warm = self._warm

    @property
    def config(self) -> EngineConfig:
        return self.fleet.config

    @config.setter
    def config(self, value: EngineConfig) -> None:
        self.fleet.config = value

    @property
    def model(self) -> ModelInfo | None:
        return self.fleet.model

    @model.setter
    def model(self, value: ModelInfo | None) -> None:
        self.fleet.model = value

    @property
    def ready(self) -> bool:
        """True while a replica serves."""
        return bool(self.fleet.serving)

    @property
    def num_restarts(self) -> int:
        return sum(replica.engine.num_restarts for replica in self.fleet.replicas.values())

    @property
    def last_death(self) -> str | None:
        return self.fleet.last_death

    @property
    def seconds_silent(self) -> float:
        """The least silence of a replica: one that answers is enough."""
        return min((replica.engine.seconds_silent for replica in self.fleet.serving), default=0.0)

    @property
    def num_requests(self) -> int:
        return len(self._at)

    async def start(self) -> ModelInfo:
        """Start the replicas and wait until all of them serve."""
        model = await self.fleet.start(self._count)
        await self.list_adapters()
        self._teller = asyncio.create_task(self._keep_telling())
        for loop in self.loops:
            loop.start()
        return model

    async def generate(self, request: NewRequest, timeout: float = 0.0) -> AsyncGenerator[Output, None]:
        """Yield outputs until one has a finish_reason, from one replica after the other if they die."""
        deadline = time.monotonic() + timeout if timeout > 0 else None
        made: list[int] = []
        waits = True
        self._limits.enter(request.tenant)
        self.demand.count(len(request.prompt))
        try:
            for life in itertools.count(1):
                replica = await self._place(request, made, deadline)
                try:
                    async with aclosing(self._outputs(replica, request, made, deadline)) as outputs:
                        async for output in outputs:
                            if waits:
                                self._limits.begin(request.tenant)
                                waits = False
                            yield output
                            if output.finish_reason is not None:
                                return
                except EngineDead as error:
                    self.fleet.suspect(replica)
                    self._check_movable(request, replica, made, life, error)
                    self.num_moved += 1
                    log.warning("request %s moves from %s with %d tokens", request.id, replica.name, len(made))
        finally:
            if waits:
                self._limits.begin(request.tenant)

    def _check_movable(
        self, request: NewRequest, replica: Replica, made: list[int], life: int, error: EngineDead
    ) -> None:
        """Raise unless a request whose replica died may go on elsewhere."""
        if self._closing or not self.fleet.replicas:
            raise error
        if life >= _MAX_LIVES:
            raise EngineDead(f"{life} replicas died while they computed this request; the last: {error}") from error
        if made and not self._resume:
            raise EngineDead(f"{replica.name} died after {len(made)} tokens of this answer: {error}") from error

    async def _place(self, request: NewRequest, made: list[int], deadline: float | None) -> Replica:
        """Choose a replica. EngineDead: none has served for a while."""
        ask = self._ask(request, made)
        until = time.monotonic() + _PATIENCE
        while True:
            now = time.monotonic()
            views = [replica.view for replica in self.fleet.serving if replica.engine.ready]
            name = self._placement.choose(ask, views, now) if views else None
            if name is not None:
                replica = self.fleet.replicas[name]
                replica.view.send(ask)
                self._at[request.id] = replica
                return replica
            if self._closing or not self.fleet.replicas or (not views and now > until):
                raise EngineDead(f"no replica serves: {self.fleet.last_death or 'all are starting'}")
            if deadline is not None and now > deadline:
                raise RequestTimeout("no replica took the request within the time that this server allows")
            self.fleet.changed.clear()
            try:
                await asyncio.wait_for(self.fleet.changed.wait(), _ASK_AGAIN)
            except asyncio.TimeoutError:
                continue

    def _ask(self, request: NewRequest, made: list[int]) -> Ask:
        known = None if request.adapter is None else self.adapters.get(request.adapter)
        adapter = request.adapter if known is None else known.identity
        tokens = [*request.prompt, *made]
        expected = min(self.demand.answer, request.params.max_tokens)
        keys = prefix_keys(tokens, f"{adapter}\0{request.cache_salt}")
        return Ask(request.id, adapter, 0 if known is None else known.rank, len(tokens), expected, keys)

    async def _outputs(
        self, replica: Replica, request: NewRequest, made: list[int], deadline: float | None
    ) -> AsyncGenerator[Output, None]:
        """Yield a replica's outputs for a request, and add their tokens to `made`."""
        if going_on := len(made):
            params = msgspec.structs.replace(request.params, prompt_logprobs=None)
            sent = msgspec.structs.replace(request, made=list(made), params=params)
        else:
            sent = request
        left = 0.0 if deadline is None else max(0.001, deadline - time.monotonic())
        try:
            await self._tell(replica)
            async with aclosing(replica.engine.generate(sent, left)) as outputs:
                async for output in outputs:
                    self._note(replica, request, output, len(made), bool(going_on))
                    made += output.tokens
                    if going_on:  # what a client learns once has been told
                        output = msgspec.structs.replace(output, queue_time=None, num_cached=0, prompt_logprobs=None)
                    yield output
        finally:
            replica.view.end(request.id)
            if self._at.get(request.id) is replica:
                del self._at[request.id]

    def _note(self, replica: Replica, request: NewRequest, output: Output, num_made: int, going_on: bool) -> None:
        """Take what an answer tells: the request's progress, the tenant's service and the replica's load."""
        view, load = replica.view, replica.engine.load
        view.begin(request.id)
        if load is not None:
            view.resident = load.on_device
        amount = 0.0
        if num_made == 0 and not going_on:
            num_prompt = len(request.prompt)
            cached = min(output.num_cached, num_prompt)
            amount += self._cost.cached(0, cached) + self._cost.prefill(cached, num_prompt)
        if output.tokens:
            amount += self._cost.output(len(request.prompt), num_made + 1, num_made + len(output.tokens))
        if amount:
            self._shares.note(replica.name, request.tenant, amount)
        if output.finish_reason is not None:
            self.demand.learn(num_made + len(output.tokens))

    async def _tell(self, replica: Replica) -> None:
        """Tell a replica what its tenants were served elsewhere."""
        if sums := self._shares.elsewhere(replica.name):
            await replica.engine.call("charge_elsewhere", front=self._front, sums=sums)

    async def _keep_telling(self) -> None:
        """Tell replicas at which requests wait, also when none is sent."""
        while True:
            await asyncio.sleep(_TELL)
            for replica in self.fleet.serving:
                if replica.view.num_waiting:
                    with suppress(EngineError):  # it is told all again when it is back
                        await self._tell(replica)

    async def _warm(self, replica: Replica) -> None:
        """Bring the adapters to a new replica's device that will be asked for there, before it takes requests."""
        if not isinstance(self._placement, Predicted):
            return
        names = {info.identity: info.name for info in self.adapters.values()}
        views = [*(other.view for other in self.fleet.serving), replica.view]
        hot = self._placement.hot(replica.view, views, self.config.adapters.max_loras // 2)
        for name in filter(None, map(names.get, hot)):
            params = SamplingParams(max_tokens=1, temperature=0.0)
            one = NewRequest(id=f"warm-{secrets.token_hex(8)}", prompt=[0], params=params, adapter=name)
            async with aclosing(replica.engine.generate(one)) as outputs:
                async for _ in outputs:
                    pass

    def stop(self, request_id: str, num_tokens: int) -> None:
        """End a request whose answer is whole, wherever it is."""
        replica = self._at.get(request_id)
        if replica is not None:
            replica.engine.stop(request_id, num_tokens)

    # Calls.

    async def call(self, method: str, /, **arguments: Any) -> Any:
        """Call the replicas as one engine."""
        if method == "scheduler":
            return await self.fleet.first().engine.call(method)
        answers = await self.fleet.ask_all(lambda replica: replica.engine.call(method, **arguments))
        if method in MERGED:
            return MERGED[method](answers)
        if method in _ON_ALL:
            return answers[0]
        raise Refused(Refusal(f"{method!r} is not known of a cluster"))

    async def set_scheduler(self, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Change settings of all replicas' schedulers, or of none."""
        async with self.fleet.changing:
            described, changed = await set_scheduler(self.fleet, changes)
            self._limits.change(described)
            return described, changed

    async def load_adapter(
        self, name: str, path: str, in_place: bool = False, pinned: bool | None = None
    ) -> AdapterInfo:
        """Serve an adapter on all replicas, or on none. All must read the same weights."""
        async with self.fleet.changing:
            info = self.adapters[name] = await load_adapter(self.fleet, name, path, in_place, pinned)
            return info

    async def pin_adapter(self, name: str, pinned: bool) -> AdapterInfo:
        """Keep an adapter on the device of all replicas, or no longer."""
        async with self.fleet.changing:
            await self.fleet.change_all(
                lambda replica: replica.engine.pin_adapter(name, pinned),
                lambda replica, done: replica.engine.pin_adapter(name, not pinned),
            )
            remember_pin(self.fleet, name, pinned)
        return await self.describe_adapter(name)

    async def unload_adapter(self, name: str) -> int:
        """Forget an adapter on all replicas, and return how many requests still run on it."""
        async with self.fleet.changing:
            if name not in self.fleet.paths:
                raise Refused(Refusal(f"adapter {name!r} is not loaded", RefusalKind.NOT_FOUND))
            self.fleet.paths.pop(name)
            self.adapters.pop(name, None)
            remember_pin(self.fleet, name, False)
            return sum(await self.fleet.ask_all(lambda replica: replica.engine.unload_adapter(name)))

    async def until_unloaded(self, adapter: AdapterInfo, in_flight: int) -> int:
        """Wait until no replica runs a request on an adapter that was unloaded, or return `in_flight`."""
        left = await self.fleet.ask_all(lambda replica: replica.engine.until_unloaded(adapter, in_flight))
        return in_flight if any(left) else 0

    async def stage_base(self, folder: str, version: str, where: str, adapters: Mapping[str, str], rest: float) -> Any:
        """Bring another base into the memory of all replicas, or of none."""
        async with self.fleet.changing:
            return await self.fleet.change_all(
                lambda replica: replica.engine.stage_base(folder, version, where, adapters, rest),
                lambda replica, done: replica.engine.unstage_base(),
            )

    async def switch_base(self, version: str, rule: str) -> dict[str, Any]:
        """Serve the staged base on all replicas."""
        async with self.fleet.changing:
            outcome = await switch_base(self.fleet, version, rule)
        await self.list_adapters()
        return outcome

    async def unstage_base(self) -> None:
        """Forget what is staged."""
        await self.fleet.ask_all(lambda replica: replica.engine.unstage_base())

    async def list_adapters(self) -> list[AdapterInfo]:
        """Return all adapters, with their tier on each replica."""

        async def ask(replica: Replica) -> tuple[str, list[AdapterInfo]]:
            return replica.name, await replica.engine.list_adapters()

        merged = merge_adapters(dict(await self.fleet.ask_all(ask)))
        self.adapters = {info.name: info for info in merged}
        return merged

    async def describe_adapter(self, name: str) -> AdapterInfo:
        """Return one adapter."""

        async def ask(replica: Replica) -> tuple[str, AdapterInfo]:
            return replica.name, await replica.engine.describe_adapter(name)

        return merge_adapter(dict(await self.fleet.ask_all(ask)))

    @property
    def replica_states(self) -> dict[str, str]:
        return {replica.name: replica.state for replica in self.fleet.replicas.values()}

    async def replicas(self) -> list[ReplicaState]:
        """Describe the replicas."""
        return await self.fleet.states()

    async def add_replica(self) -> str:
        """Start one more replica and return its name."""
        return (await self.fleet.add()).name

    async def drain_replica(self, name: str) -> None:
        """Let a replica's requests end, then remove it. Those that take too long go on elsewhere."""
        serving = {replica.name for replica in self.fleet.serving}
        if name not in self.fleet.replicas:
            known = ", ".join(self.fleet.replicas)
            raise Refused(Refusal(f"no replica is called {name!r}; there are: {known}", RefusalKind.NOT_FOUND))
        if serving <= {name}:
            raise Refused(Refusal(f"{name} is the only replica that serves: add one first"))
        await self.fleet.remove(name, _DRAIN)

    async def close(self) -> None:
        """End all replicas; requests in flight fail."""
        self._closing = True
        for loop in self.loops:
            await loop.close()
        if self._teller is not None:
            self._teller.cancel()
            await asyncio.gather(self._teller, return_exceptions=True)
        await self.fleet.close()

    def kill(self) -> None:
        """End all replicas now."""
        self._closing = True
        for replica in self.fleet.replicas.values():
            replica.engine.kill()
