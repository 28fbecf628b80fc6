"""Replicas that Ray Serve places, watches and restarts, on one machine or many. The only file that imports Ray.

Each replica is an application of its own with one Serve replica, so that its handle reaches exactly this engine; which
engine a request goes to is `placement.py`'s to say. An actor owns an engine process as a server does. A front that
finds the applications running joins them, so several fronts may serve the same replicas.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from types import MappingProxyType
from typing import Any

import msgspec

from inlaid.cluster.fleet import MakeReplica
from inlaid.config import ConfigError, EngineConfig
from inlaid.engine.refusal import Refusal, Refused
from inlaid.engine.request import NewRequest, Output
from inlaid.worker.client import FACTORY, EngineClient
from inlaid.worker.errors import EngineDead, EngineError, RequestTimeout
from inlaid.worker.interface import ReplicaState
from inlaid.worker.messages import AdapterInfo, ModelInfo, ReplicaLoad

log = logging.getLogger(__name__)

PREFIX = "inlaid-"  # of the applications' names
_LOOK = 0.5  # seconds between two looks at an actor
_PATIENCE = 30.0  # seconds that a call waits for its actor
_ERRORS: Mapping[str, type[EngineError]] = MappingProxyType(
    {"dead": EngineDead, "error": EngineError, "timeout": RequestTimeout}
)


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """An actor's engine, as a front asks for it again and again."""

    life: str  # drawn when the actor started
    ready: bool
    restarts: int
    silent: float
    last_death: str | None
    model: ModelInfo | None
    adapters: list[AdapterInfo]
    config: EngineConfig
    load: ReplicaLoad | None


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One item of a stream: an output, or the error that ended it."""

    output: Output | None = None
    error: str = ""  # a key of _ERRORS, or refused
    message: str = ""
    refusal: Refusal | None = None
    value: Any = None
    load: ReplicaLoad | None = None


class EngineActor:
    """One engine process, as an actor that Ray placed. What crosses Ray is msgpack, as between server and engine."""

    def __init__(
        self, config: bytes, adapters: dict[str, str], timeout: float, environment: dict[str, str], factory: str
    ) -> None:
        self.life = secrets.token_hex(8)
        self.gave_up = ""
        self.client = EngineClient(
            msgspec.msgpack.decode(config, type=EngineConfig),
            adapters,
            timeout=timeout,
            give_up=self._give_up,
            environment=environment,
            factory=factory,
            report_load=True,
        )
        self._starting: asyncio.Task[ModelInfo] | None = None

    def _give_up(self, reason: str) -> None:
        self.gave_up = reason

    async def start(self) -> bytes:
        """Start the engine once, however many fronts ask."""
        if self._starting is None:
            self._starting = asyncio.create_task(self.client.start())
        starting = self._starting
        return await _told(lambda: asyncio.shield(starting))

    async def generate(self, request: bytes, timeout: float) -> AsyncIterator[bytes]:
        """Yield items."""
        new = msgspec.msgpack.decode(request, type=NewRequest)
        try:
            async with aclosing(self.client.generate(new, timeout)) as outputs:
                async for output in outputs:
                    yield msgspec.msgpack.encode(Item(output=output, load=self.client.load))
        except (EngineError, Refused) as error:
            yield msgspec.msgpack.encode(_item(error))

    async def stop(self, request_id: str, num_tokens: int) -> None:
        self.client.stop(request_id, num_tokens)

    async def do(self, method: str, arguments: bytes) -> bytes:
        """Call a method of the client."""
        values = msgspec.msgpack.decode(arguments)
        if method == "until_unloaded":
            values["adapter"] = msgspec.convert(values["adapter"], AdapterInfo)
        if method == "call":
            return await _told(lambda: self.client.call(values.pop("method"), **values))
        return await _told(lambda: getattr(self.client, method)(**values))

    async def status(self) -> bytes:
        client = self.client
        return msgspec.msgpack.encode(
            Status(
                life=self.life,
                ready=client.ready,
                restarts=client.num_restarts,
                silent=client.seconds_silent,
                last_death=self.gave_up or client.last_death,
                model=client.model,
                adapters=list(client.adapters.values()),
                config=client.config,
                load=client.load,
            )
        )

    async def process_id(self) -> int:
        """Return the actor's own process."""
        return os.getpid()

    async def check_health(self) -> None:
        """Let Serve replace an actor whose engine does not come back."""
        if self.gave_up:
            raise RuntimeError(self.gave_up)


async def _told(ask: Callable[[], Any]) -> bytes:
    try:
        return msgspec.msgpack.encode(Item(value=await ask()))
    except (EngineError, Refused) as error:
        return msgspec.msgpack.encode(_item(error))


def _item(error: Exception) -> Item:
    if isinstance(error, Refused):
        return Item(error="refused", refusal=error.refusal)
    kinds: dict[type[Exception], str] = {kind: name for name, kind in _ERRORS.items()}
    return Item(error=kinds.get(type(error), "error"), message=str(error))


def _checked(item: Item) -> Item:
    """Raise the error that an item holds."""
    if item.refusal is not None:
        raise Refused(item.refusal)
    if item.error:
        raise _ERRORS[item.error](item.message)
    return item


class RayReplica:
    """The front's side of an actor: the methods of an engine, over a handle of Serve."""

    def __init__(self, name: str, deploy: Callable[[], Any], remove: Callable[[], None]) -> None:
        self.config = EngineConfig(model="")
        self.adapters: dict[str, AdapterInfo] = {}
        self.model: ModelInfo | None = None
        self.load: ReplicaLoad | None = None
        self.num_restarts = 0
        self.last_death: str | None = None
        self.ready = False
        self.num_requests = 0
        self._name = name
        self._deploy, self._remove = deploy, remove
        self._handle: Any = None
        self._life = ""
        self._restarts = 0
        self._heard = time.monotonic()
        self._silent = 0.0
        self._watcher: asyncio.Task[None] | None = None

    @property
    def seconds_silent(self) -> float:
        """The seconds since the actor was heard of, or those that its engine owes an answer."""
        return max(self._silent, time.monotonic() - self._heard - 2 * _LOOK, 0.0)

    @property
    def replica_states(self) -> dict[str, str]:
        return {}

    async def start(self) -> ModelInfo:
        """Deploy the actor, or join it, and wait until its engine serves."""
        try:
            self._handle = await asyncio.to_thread(self._deploy)
            self.model = msgspec.convert((await self._item("start")).value, ModelInfo)
        except (EngineError, Refused):
            raise
        except Exception as error:
            raise EngineDead(f"Ray could not start {self._name}: {error}") from error
        await self._look()
        self._watcher = asyncio.create_task(self._watch())
        return self.model

    async def generate(self, request: NewRequest, timeout: float = 0.0) -> AsyncGenerator[Output, None]:
        """Yield outputs; EngineDead when the actor dies."""
        stream = self._handle.options(stream=True).generate.remote(msgspec.msgpack.encode(request), timeout)
        self.num_requests += 1
        over = False
        try:
            async for data in stream:
                item = _checked(msgspec.msgpack.decode(data, type=Item))
                assert item.output is not None
                self.load = item.load or self.load
                over = item.output.finish_reason is not None
                yield item.output
            if not over:
                raise EngineDead(f"{self._name} ended a stream in its middle")
        except (EngineError, Refused):
            raise
        except (GeneratorExit, asyncio.CancelledError):
            raise
        except Exception as error:
            self.ready, self.last_death = False, f"its actor died: {type(error).__name__}"
            raise EngineDead(f"{self._name}: {self.last_death}") from error
        finally:
            self.num_requests -= 1
            if not over:
                stream.cancel()

    def stop(self, request_id: str, num_tokens: int) -> None:
        self._handle.stop.remote(request_id, num_tokens)

    async def call(self, method: str, /, **arguments: Any) -> Any:
        return await self._do("call", method=method, **arguments)

    async def set_scheduler(self, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        described, changed = await self._do("set_scheduler", changes=changes)
        return described, changed

    async def load_adapter(
        self, name: str, path: str, in_place: bool = False, pinned: bool | None = None
    ) -> AdapterInfo:
        value = await self._do("load_adapter", name=name, path=path, in_place=in_place, pinned=pinned)
        self.adapters[name] = msgspec.convert(value, AdapterInfo)
        return self.adapters[name]

    async def pin_adapter(self, name: str, pinned: bool) -> AdapterInfo:
        self.adapters[name] = msgspec.convert(await self._do("pin_adapter", name=name, pinned=pinned), AdapterInfo)
        return self.adapters[name]

    async def unload_adapter(self, name: str) -> int:
        in_flight = int(await self._do("unload_adapter", name=name))
        self.adapters.pop(name, None)
        return in_flight

    async def until_unloaded(self, adapter: AdapterInfo, in_flight: int) -> int:
        return int(await self._do("until_unloaded", adapter=adapter, in_flight=in_flight))

    async def stage_base(self, folder: str, version: str, where: str, adapters: Mapping[str, str], rest: float) -> Any:
        arguments = {"folder": folder, "version": version, "where": where, "adapters": dict(adapters), "rest": rest}
        return await self._do("stage_base", **arguments)

    async def switch_base(self, version: str, rule: str) -> dict[str, Any]:
        outcome: dict[str, Any] = await self._do("switch_base", version=version, rule=rule)
        await self._look()
        return outcome

    async def unstage_base(self) -> None:
        await self._do("unstage_base")

    async def list_adapters(self) -> list[AdapterInfo]:
        listed = msgspec.convert(await self._do("list_adapters"), list[AdapterInfo])
        self.adapters = {info.name: info for info in listed}
        return listed

    async def describe_adapter(self, name: str) -> AdapterInfo:
        return msgspec.convert(await self._do("describe_adapter", name=name), AdapterInfo)

    async def replicas(self) -> list[ReplicaState]:
        return []

    async def close(self) -> None:
        """Remove the actor, if this front deployed it."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await asyncio.to_thread(self._remove)

    def kill(self) -> None:
        self._remove()

    async def _do(self, method: str, /, **arguments: Any) -> Any:
        return (await self._item("do", method, msgspec.msgpack.encode(arguments))).value

    async def _item(self, name: str, *arguments: Any) -> Item:
        try:
            data = await getattr(self._handle, name).remote(*arguments)
        except Exception as error:
            raise EngineDead(f"{self._name}: its actor does not answer: {type(error).__name__}") from error
        return _checked(msgspec.msgpack.decode(data, type=Item))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            with suppress(EngineError):
                await self._look()

    async def _look(self) -> None:
        """Take over the actor's state. One that Serve started anew is told to start its engine."""
        try:
            data = await asyncio.wait_for(self._handle.status.remote(), _PATIENCE)
        except Exception as error:
            raise EngineDead(f"{self._name}: its actor does not answer: {type(error).__name__}") from error
        status = msgspec.msgpack.decode(data, type=Status)
        self._heard, self._silent = time.monotonic(), status.silent
        if status.life != self._life:
            if self._life:
                self.last_death = "its actor was started anew"
                self._restarts += 1
            self._life = status.life
        if not status.ready and status.model is None:
            self.ready = False
            await self._item("start")
            return
        self.num_restarts = self._restarts + status.restarts
        self.ready, self.load, self.config = status.ready, status.load, status.config
        self.model = status.model or self.model
        self.adapters = {info.name: info for info in status.adapters}
        self.last_death = None if status.ready else status.last_death


def ray_replicas(
    address: str, gpus: float | None, timeout: float, environment: Mapping[str, str], factory: str = FACTORY
) -> MakeReplica:
    """Connect to Ray and return what makes a replica there. ConfigError: there is no Ray, or no cluster."""
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ConfigError("--ray-address needs Ray Serve: pip install 'inlaid[cluster]'") from error
    try:
        if address == "local":
            ray.init(include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address, log_to_driver=False)
        serve.start(proxy_location="Disabled")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--ray-address {address}: {error}") from error
    share = gpus if gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
    deployment = serve.deployment(
        EngineActor,
        name="engine",
        num_replicas=1,
        max_ongoing_requests=100_000,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=5.0,
        ray_actor_options={"num_cpus": 0, "num_gpus": share},
    )

    def make(name: str, config: EngineConfig, adapters: Mapping[str, str], give_up: Callable[[str], None]) -> Any:
        app = PREFIX + name
        joined = app in serve.status().applications

        def deploy() -> Any:
            if joined:
                return serve.get_app_handle(app)
            encoded = msgspec.msgpack.encode(config)
            bound = deployment.bind(encoded, dict(adapters), timeout, dict(environment), factory)
            return serve.run(bound, name=app, route_prefix=None)

        def remove() -> None:
            if not joined:
                serve.delete(app)

        return RayReplica(name, deploy, remove)

    return make
