"""Adapters and the scheduler, seen and changed while serving."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from inlaid.server.protocol.base import Body, Payload


class LoadAdapterBody(Body, frozen=True, kw_only=True):
    lora_name: Annotated[str, Meta(min_length=1, max_length=256)]
    lora_path: Annotated[str, Meta(min_length=1, max_length=4096)]
    load_inplace: bool | None = None
    pinned: bool | None = None  # stays on the device; without it: as it was


class UnloadAdapterBody(Body, frozen=True, kw_only=True):
    lora_name: str
    lora_int_id: int | None = None  # no effect: names are unique


class SchedulerBody(Body, frozen=True, kw_only=True):
    """Any of them; what is left out stays."""

    policy: str | None = None
    options: dict[str, Any] | None = None
    weights: dict[str, float] | None = None
    limits: dict[str, dict[str, int | None]] | None = None
    max_num_waiting: int | None = None


class ReplicaCard(Payload, kw_only=True):
    """A replica of a cluster; the fields are ReplicaState's."""

    name: str
    state: str
    requests: int
    restarts: int
    pace: float  # seconds of its steps for each second of the replicas' together
    stats: dict[str, float]


class ReplicaList(Payload, kw_only=True):
    replicas: list[ReplicaCard]


class MeasuredStep(Payload, kw_only=True):
    """A step, its wall time and what it held; the fields of the load are those of `inlaid.sim`'s cost model.

    `host` are the seconds to make and submit it, `waited` those that the host, which had made the next meanwhile,
    waited for its end (null: it made none), `number` its place among all steps.
    """

    seconds: float
    load: dict[str, int]
    host: float
    waited: float | None
    number: int


class MeasuredLoad(Payload, kw_only=True):
    """Seconds that an adapter of this rank took, the last time; 0: never yet."""

    rank: int
    read_seconds: float
    copy_seconds: float


class StepList(Payload, kw_only=True):
    steps: list[MeasuredStep]
    loads: list[MeasuredLoad]


class AdapterState(Payload, kw_only=True):
    """An adapter's residency and history; the fields are AdapterInfo's."""

    name: str
    identity: str
    rank: int
    bytes: int
    tier: str
    requests: int
    load_seconds: float
    check_seconds: float
    on_host: bool
    reads: int
    loads: int
    evictions: int
    hits: int
    copy_seconds: float
    pinned: bool
    replicas: dict[str, str]  # its tier on each replica of a cluster


class AdapterCard(AdapterState, kw_only=True):
    path: str


class AdapterList(Payload, kw_only=True):
    adapters: list[AdapterCard]
    max_loras: int
