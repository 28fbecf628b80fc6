"""ServingEngine: the engine as the server sees it. `worker/client.py` is one engine process, `cluster/client.py` many
replicas behind the same methods.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

import msgspec

from inlaid.config import EngineConfig
from inlaid.engine.request import NewRequest, Output
from inlaid.worker.messages import AdapterInfo, ModelInfo


class ReplicaState(msgspec.Struct, frozen=True, kw_only=True):
    """One of several engines, as /health and /metrics show it."""

    name: str
    state: str  # starting, serving, draining or down
    requests: int
    restarts: int
    pace: float = 1.0  # seconds of its steps for each second of the replicas' together
    stats: dict[str, float] = {}  # empty while it does not answer


class ServingEngine(Protocol):
    """The engine to the server's routes. The methods are described in `EngineClient`."""

    config: EngineConfig
    adapters: dict[str, AdapterInfo]
    model: ModelInfo | None

    @property
    def num_restarts(self) -> int: ...

    @property
    def last_death(self) -> str | None: ...

    @property
    def ready(self) -> bool: ...

    @property
    def seconds_silent(self) -> float: ...

    @property
    def replica_states(self) -> dict[str, str]:
        """States of the replicas by name; none where there is one engine."""
        ...

    @property
    def num_requests(self) -> int: ...

    async def start(self) -> ModelInfo: ...

    def generate(self, request: NewRequest, timeout: float = 0.0) -> AsyncGenerator[Output, None]: ...

    def stop(self, request_id: str, num_tokens: int) -> None: ...

    async def call(self, method: str, /, **arguments: Any) -> Any: ...

    async def set_scheduler(self, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]: ...

    async def load_adapter(
        self, name: str, path: str, in_place: bool = False, pinned: bool | None = None
    ) -> AdapterInfo: ...

    async def pin_adapter(self, name: str, pinned: bool) -> AdapterInfo: ...

    async def unload_adapter(self, name: str) -> int: ...

    async def until_unloaded(self, adapter: AdapterInfo, in_flight: int) -> int: ...

    async def stage_base(
        self, folder: str, version: str, where: str, adapters: Mapping[str, str], rest: float
    ) -> Any: ...

    async def switch_base(self, version: str, rule: str) -> dict[str, Any]: ...

    async def unstage_base(self) -> None: ...

    async def list_adapters(self) -> list[AdapterInfo]: ...

    async def describe_adapter(self, name: str) -> AdapterInfo: ...

    async def replicas(self) -> list[ReplicaState]:
        """Describe the replicas; none where there is one engine."""
        ...

    async def add_replica(self) -> str:
        """Start one more replica and return its name."""
        ...

    async def drain_replica(self, name: str) -> None:
        """Let a replica's requests end, then remove it."""
        ...

    async def close(self) -> None: ...

    def kill(self) -> None: ...
