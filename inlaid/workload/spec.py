"""A workload as its file declares it: typed, checked when it is made, and drawn by `plan.plan`."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from inlaid.workload.arrivals import Arrivals
from inlaid.workload.lengths import Lengths, ScaledLengths
from inlaid.workload.popularity import AdapterChoice
from inlaid.workload.traces import Trace

Sampling = Literal["independent", "sequential", "merged"]


class Objective(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits that a request of a class must meet, in milliseconds; None asks nothing.

    `share` puts that part of the requests, drawn by the seed, into the class; `adapters` puts those of
    the named adapters there.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None
    share: float = 0.0
    adapters: list[str] = []

    def __post_init__(self) -> None:
        limits = [v for v in (self.ttft_ms, self.tpot_ms, self.e2el_ms) if v is not None]
        if not 0 <= self.share <= 1 or any(not v > 0 for v in limits):
            raise ValueError("an objective needs limits above 0 ms and a share from 0 to 1")


class Stream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests of one kind; a workload is one or more streams at the same time.

    `tenant` may contain {adapter} and {tenant} (the trace row's own); "" sends no tenant. Rows of `trace` are used
    where arrival, adapters, input or output say "trace"; a prompt in the row is sent as it is. A stream without a
    limit of its own lasts until the workload's `duration_s`.
    """

    arrival: Arrivals = Arrivals()
    adapters: AdapterChoice = AdapterChoice()
    input: Lengths = Lengths()
    output: Lengths = Lengths()
    start_s: float = 0.0
    duration_s: float | None = None
    num_requests: int | None = None
    tenant: str = "{adapter}"
    trace: Trace | None = None

    def __post_init__(self) -> None:
        uses = "trace" in (self.arrival.process, self.adapters.distribution, self.input.kind, self.output.kind)
        if uses and self.trace is None:
            raise ValueError('a part says "trace" but the stream has no trace = { path = ... }')
        if not 0 <= self.start_s < math.inf or (self.duration_s is not None and not 0 < self.duration_s < math.inf):
            raise ValueError("start_s must be at least 0 and duration_s above 0, and both finite")
        if self.num_requests is not None and self.num_requests < 1:
            raise ValueError("num_requests must be at least 1")

    def name_tenant(self, adapter: str | None, own: str | None = None) -> str:
        """Fill in the tenant's name for a request; `own` is the tenant that its trace row names."""
        return self.tenant.replace("{adapter}", adapter or "base").replace("{tenant}", own or "")


class TaskKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Mean input and output tokens of a kind of task, and the standard deviation of the output's logarithm."""

    input: int
    output: int
    sigma: float


class Tasks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Many tasks, each an adapter and a tenant, with lengths of their own: Poisson arrivals, Zipf popularity.

    Every task is of a kind drawn from `kinds`. The engine is not told how long an answer will be: the request allows
    `max_tokens`, and the answer ends at its own length as an end token would end it.
    """

    count: int
    rate: float
    kinds: list[TaskKind]
    zipf: float = 1.0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.count < 1 or not self.kinds or not 0 < self.rate < math.inf or self.max_tokens < 2:
            raise ValueError("tasks need count >= 1, a rate above 0, at least one kind, and max_tokens >= 2")


class BurstyTenants(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tenants that send given numbers of requests in bursts, as people do.

    A tenant has a burst for every `requests_per_burst` of its requests, at a random moment and of random size; its
    requests lie around the bursts with standard deviation `burst_s`. Lengths differ by tenant.
    """

    requests: list[int]
    input: ScaledLengths
    output: ScaledLengths
    requests_per_burst: int = 100
    burst_s: float = 100.0
    adapters: AdapterChoice = AdapterChoice("none")

    def __post_init__(self) -> None:
        if not self.requests or any(count < 1 for count in self.requests) or self.requests_per_burst < 1:
            raise ValueError("bursty tenants need a list of requests, each at least 1, and requests_per_burst >= 1")


class AdapterSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The adapters that a workload is made for: by name, or just how many. `ranks` are given to them in turn."""

    names: list[str] = []
    count: int = 0
    ranks: tuple[int, ...] = (16,)


class EngineSizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the engine that a workload is made for. None leaves each target its own default."""

    kv_tokens: int | None = None
    max_loras: int | None = None
    max_num_seqs: int | None = None


class SimulatorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the simulator alone: the machine, and whether this workload is held to the bound on unfairness."""

    machine: str = "a10g"
    fairness: bool = True


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests of streams, tasks or bursty tenants, and the engine and objectives that they are made for.

    `sampling` says how streams are drawn. `independent` gives each a generator of its own, so that changing one leaves
    the others as they are. `sequential` draws one stream after the other from one generator, a whole number of requests
    each; `merged` draws one Poisson process whose requests fall to the streams by their rates. The recorded suites use
    the last two; a new workload needs neither.
    """

    streams: list[Stream] = []
    seed: int = 0
    classes: dict[str, Objective] = {}
    weights: dict[str, float] = {}  # tenant -> its fair weight; others have 1
    name: str = ""
    about: str = ""
    duration_s: float | None = None
    sampling: Sampling = "independent"
    tasks: Tasks | None = None
    bursty: BurstyTenants | None = None
    adapters: AdapterSet = AdapterSet()
    engine: EngineSizes = EngineSizes()
    simulator: SimulatorSettings = SimulatorSettings()

    def __post_init__(self) -> None:
        sources = bool(self.streams) + (self.tasks is not None) + (self.bursty is not None)
        if sources != 1:
            raise ValueError("a workload needs at least one stream, or [tasks], or [bursty], and only one of the three")
        if self.duration_s is None and not self.streams:
            raise ValueError("[tasks] and [bursty] need the workload's duration_s")
        if self.duration_s is not None and not 0 < self.duration_s < math.inf:
            raise ValueError("duration_s must be above 0 and finite")
        if sum(objective.share for objective in self.classes.values()) > 1 + 1e-9:
            raise ValueError("the shares of the classes add up to more than 1")
        if any(not weight > 0 for weight in self.weights.values()):
            raise ValueError("tenant weights must be above 0")

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters it is made for: its own, one per task, or as many as `adapters.count`."""
        if self.adapters.names:
            return self.adapters.names
        count = self.tasks.count if self.tasks is not None else self.adapters.count
        prefix = "adapter" if self.tasks is None else "task"
        return [f"{prefix}-{number:04d}" for number in range(count)]

    @property
    def adapter_ranks(self) -> dict[str, int]:
        """Rank of each of `adapter_names`."""
        ranks = self.adapters.ranks
        return {name: ranks[number % len(ranks)] for number, name in enumerate(self.adapter_names)}

    def adapters_among(self, served: list[str]) -> list[str]:
        """Return the adapters that the workload names, in its order; all that are served if it names none."""
        missing = [name for name in self.adapters.names if name not in served]
        if missing:
            raise ValueError(f"the workload is made for adapter {missing[0]!r}, which is not served: serve it too")
        return self.adapters.names or served

    def seconds_of(self, stream: Stream) -> float | None:
        """Return how long a stream lasts: its own limit, or the rest of the workload; None if it counts requests."""
        if stream.duration_s is not None or stream.num_requests is not None or self.duration_s is None:
            return stream.duration_s
        return self.duration_s - stream.start_s
