"""Autoscaling on a virtual clock: a planner adds and drains simulated replicas, whose start takes what a feature says.

Features are BlitzScale's names. They choose where a new replica's weights come from, and whether it takes requests
before all of them are there (`Start`). Prefill and decode share an engine, as ours do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from inlaid.cluster.placement import Placement
from inlaid.cluster.planner import Load, Planner, Router
from inlaid.sim.cluster import ClusterOutcome, ClusterSim, SimReplica
from inlaid.sim.request_log import Arrival
from inlaid.sim.simulate import Setup

INTERVAL = 0.25  # seconds between two plans


@dataclass(frozen=True)
class Machine:
    """Bytes of a model's weights, and what brings them: GB a second from disk, host memory and a peer."""

    weights_gb: float = 5.5
    disk: float = 2.0
    host: float = 20.0
    peer: float = 50.0
    begin: float = 0.3  # seconds of a start beside the weights
    keep_seconds: float = 30.0  # that host memory keeps the weights of a replica that has ended


@dataclass(frozen=True)
class Start:
    """The source of a new replica's weights, and what the replica does meanwhile."""

    source: str = "disk"  # disk, host, peer, or cache: host memory if a replica ended there lately, else disk
    live: bool = False  # serves while it loads, at the pace of the layers that it has
    mock: bool = False  # the load takes router.mock_load_millis
    mock_transfer: bool = False  # KV moves in router.mock_transfer_millis, where prefill and decode are apart
    mutate: bool = False  # there, a replica of a kind that has too many becomes one of the other


# A flag of a feature and what it changes; those that change nothing here are told apart.
FLAGS: Mapping[str, Callable[[Start], Start]] = MappingProxyType(
    {
        "impl_sllm": lambda start: replace(start, source="disk"),
        "cache_replace": lambda start: replace(start, source="cache"),
        "cache_all_hit": lambda start: replace(start, source="host"),
        "impl_blitz": lambda start: replace(start, source="peer"),
        "impl_live": lambda start: replace(start, live=True),
        "impl_live_pro": lambda start: replace(start, live=True),
        "mock_load": lambda start: replace(start, mock=True),
        "motiv": lambda start: replace(start, mock=True),
        "mock_transfer": lambda start: replace(start, mock_transfer=True),
        "mutate": lambda start: replace(start, mutate=True),
    }
)
NO_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "ngrok": "how the router is reached",
        "impl_fast": "how weights are multicast; here one peer sends to one replica",
        "impl_fast_pro": "how weights are multicast; here one peer sends to one replica",
        "unidirect": "which replicas send weights; here the sender's link is not modelled",
        "optimized_tanz": "how weights are multicast; here one peer sends to one replica",
    }
)


def parse_feature(text: str) -> tuple[Start, dict[str, str]]:
    """Return what a feature's flags select, and those that select nothing here, with the reason."""
    start, without = Start(), dict[str, str]()
    for flag in filter(None, (part.strip() for part in text.split(","))):
        if flag in FLAGS:
            start = FLAGS[flag](start)
        elif flag in NO_EFFECT:
            without[flag] = NO_EFFECT[flag]
        else:
            raise ValueError(f"unknown flag {flag!r} of a feature; known: {', '.join([*FLAGS, *NO_EFFECT])}")
    return start, without


@dataclass
class Timeline:
    """Replicas over time: seconds, wanted, there (starting ones included), serving."""

    points: list[tuple[float, int, int, int]] = field(default_factory=list)


class Scaled:
    """The loop between the planner and a simulated cluster."""

    def __init__(
        self,
        trace: Sequence[Arrival],
        setup: Setup,
        placement: Placement,
        planner: Planner | None,
        router: Router,
        start: Start,
        machine: Machine,
    ) -> None:
        self._planner, self._router, self._start, self._machine = planner, router, start, machine
        self.sim = self._make_sim(trace, setup, placement)
        self.timeline = Timeline()
        self.gpu_seconds = 0.0
        self._last = max((arrival.time for arrival in trace), default=0.0)
        self._starting: set[str] = set()
        self._cached: list[float] = []  # when replicas ended whose weights are still in host memory
        self._told = 0.0

    def _make_sim(self, trace: Sequence[Arrival], setup: Setup, placement: Placement) -> ClusterSim:
        return ClusterSim(trace, setup, placement, self._router.least)

    def run(self) -> ClusterOutcome:
        """Serve the whole trace."""
        self.sim.at(0.0, self._plan)
        outcome = self.sim.run()
        outcome.replica_seconds = self.gpu_seconds
        return outcome

    def _plan(self) -> None:
        sim, now = self.sim, self.sim.now
        alive = [each for each in sim.replicas.values() if each.view.is_open or each.view.name in self._starting]
        self.gpu_seconds += len(sim.replicas) * (now - self._told)
        self._told = now
        wanted = self._change(alive)
        serving = sum(each.view.is_open for each in sim.replicas.values())
        self.timeline.points.append((now, wanted, len(sim.replicas), serving))
        if now < self._last or any(each.view.size for each in sim.replicas.values()) or sim.held_tokens:
            sim.at(now + INTERVAL, self._plan)

    def _change(self, alive: Sequence[SimReplica]) -> int:
        """Add and drain replicas as the planner says, and return how many it wants."""
        views = [each.view for each in alive if each.view.is_open]
        assert self._planner is not None
        wanted = self._planner.wanted(self._load(alive, alive), views, self.sim.now)
        for _ in range(wanted - len(alive)):
            self._add()
        if wanted < len(alive) and len(views) > 1:
            self._drain(min(views, key=lambda view: view.size).name)
        return wanted

    def _load(self, prefilling: Sequence[SimReplica], decoding: Sequence[SimReplica]) -> Load:
        """Return the state of the replicas that prefill and that decode."""
        demand, pools = self.sim.demand, [each.engine.scheduler.pool for each in decoding]
        waiting = sum(each.view.waiting_tokens for each in prefilling if each.view.is_open)
        return Load(
            replicas=len(prefilling),
            waiting_tokens=waiting + self.sim.held_tokens,
            used_blocks=sum(pool.capacity - pool.num_available for pool in pools),
            requests=demand.requests,
            prompt_tokens=demand.prompt_tokens,
            answer=demand.answer,
        )

    def _add(self) -> SimReplica:
        """Start a replica. One that serves while it loads has half of its layers after half of the load, and works at
        half its pace until the end."""
        seconds = self.load_seconds()
        made = self.sim.add_replica()
        made.view.is_open = False
        self._starting.add(made.view.name)
        live = self._start.live
        self.sim.at(self.sim.now + (seconds / 2 if live else seconds), lambda: self._open(made, 2.0 if live else 1.0))
        if live:
            self.sim.at(self.sim.now + seconds, lambda: made.set_pace(1.0))
        return made

    def _open(self, made: SimReplica, pace: float) -> None:
        self._starting.discard(made.view.name)
        made.set_pace(pace)
        made.view.is_open = True

    def _drain(self, name: str) -> None:
        replica = self.sim.replicas[name]
        replica.view.is_open = False
        if not replica.view.size:
            self.sim.closed.append(self.sim.replicas.pop(name))
        self._cached.append(self.sim.now)

    def load_seconds(self) -> float:
        """Return how long a replica that starts now takes."""
        machine, source = self._machine, self._start.source
        if self._start.mock:
            return self._router.mock_load_millis / 1e3
        if source == "cache":
            self._cached = [when for when in self._cached if self.sim.now - when <= machine.keep_seconds]
            source = "host" if self._cached else "disk"
            if self._cached:
                self._cached.pop()
        pace = {"disk": machine.disk, "host": machine.host, "peer": machine.peer}[source]
        return machine.begin + machine.weights_gb / pace
