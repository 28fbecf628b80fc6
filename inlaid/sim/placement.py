"""Placement: the choice among many replicas for a request whose adapter has a certain rank.

After Toppings' figure 19, with continuous batching simulated on each replica.

Adapter kernels are bound by reading adapters, so a decode step takes a constant plus a rate times ranks: times rows of
the largest rank where kernels pad (`padded`), times the sum of ranks where they do not (`exact`). Prefill stops an
replica's decodes. The figure of merit is a request's latency over its tokens, queueing included, and the share of
requests below an objective.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from inlaid.report import tables

RANKS = (8, 16, 32, 64)
MAX_BATCH = 32


@dataclass(frozen=True)
class Kernel:
    """Seconds of a decode step. The figures are those of the published worked case (24 rows of rank 32 against 16 of
    rank 64, before and after one more of rank 64)."""

    name: str
    base: float
    per_rank: float
    padded: bool

    def decode(self, ranks: Sequence[int]) -> float:
        work = len(ranks) * max(ranks, default=0) if self.padded else sum(ranks)
        return self.base + self.per_rank * work

    def after(self, batch: Occupancy, rank: int) -> float:
        """Predict a step with one more request."""
        if self.padded:
            return self.base + self.per_rank * (batch.size + 1) * max(batch.largest, rank)
        return self.base + self.per_rank * (batch.ranks + rank)

    def now(self, batch: Occupancy) -> float:
        return self.base + self.per_rank * (batch.size * batch.largest if self.padded else batch.ranks)


PADDED = Kernel("padded", 32.675e-3, 1e-3 / 512, True)
EXACT = Kernel("exact", 33.35e-3, 0.6e-3 / 256, False)
KERNELS = MappingProxyType({kernel.name: kernel for kernel in (PADDED, EXACT)})
SLO = 0.04  # seconds per token
ABOUT = (
    "60 instances of at most 32 rows, 40,000 functions of ranks 8 to 64, Zipf popularity, 60 tokens an answer; "
    "latency over tokens, queueing included, against 40 ms; means over three seeds"
)
PREFILL = 1.5  # times a decode step, as the published simulator has it


@dataclass
class Call:
    """A call of a function: a request for its adapter."""

    arrival: float
    adapter: int
    rank: int
    tokens: int
    left: int = 0
    finish: float = 0.0


@dataclass
class Occupancy:
    """Requests of a replica, running and queued, as placement sees them."""

    size: int = 0
    ranks: int = 0
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, rank: int, sign: int = 1) -> None:
        self.size += sign
        self.ranks += sign * rank
        self.counts[rank] = self.counts.get(rank, 0) + sign

    @property
    def largest(self) -> int:
        return max((rank for rank, count in self.counts.items() if count), default=0)


class Replica:
    """One engine: at most MAX_BATCH running, the rest queued; a prefill takes a step of its own."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.running: list[Call] = []
        self.queue: deque[Call] = deque()
        self.all = Occupancy()
        self.adapters: dict[int, int] = {}
        self.busy = False

    def push(self, call: Call) -> None:
        call.left = call.tokens
        self.queue.append(call)
        self.all.add(call.rank)
        self.adapters[call.adapter] = self.adapters.get(call.adapter, 0) + 1

    def step(self, now: float) -> float:
        """Make the next step and return when it ends; every request in it then has one more token."""
        if self.queue and len(self.running) < MAX_BATCH:
            self.running.append(self.queue.popleft())
            end = now + PREFILL * self.kernel.decode([call.rank for call in self.running])
            self._made([self.running[-1]], end)
        else:
            end = now + self.kernel.decode([call.rank for call in self.running])
            self._made(self.running, end)
        return end

    def _made(self, calls: list[Call], end: float) -> None:
        for call in calls:
            call.left -= 1
            if call.left <= 0:
                call.finish = end
                self.all.add(call.rank, -1)
                self.adapters[call.adapter] -= 1
                if not self.adapters[call.adapter]:
                    del self.adapters[call.adapter]
        self.running = [call for call in self.running if call.left > 0]


Chooser = Callable[[Sequence[Replica], Call, random.Random], int]


def at_random(replicas: Sequence[Replica], call: Call, rng: random.Random) -> int:
    return rng.randrange(len(replicas))


def first_fit(replicas: Sequence[Replica], call: Call, rng: random.Random) -> int:
    """Choose the first with a free place, else the one with the fewest requests."""
    for place, replica in enumerate(replicas):
        if replica.all.size < MAX_BATCH:
            return place
    return most_idle(replicas, call, rng)


def most_idle(replicas: Sequence[Replica], call: Call, rng: random.Random) -> int:
    return min(range(len(replicas)), key=lambda place: replicas[place].all.size)


def two_choices(replicas: Sequence[Replica], call: Call, rng: random.Random) -> int:
    """Choose the more idle of two drawn at random."""
    one, other = rng.randrange(len(replicas)), rng.randrange(len(replicas))
    return one if replicas[one].all.size <= replicas[other].all.size else other


def with_adapter(replicas: Sequence[Replica], call: Call, rng: random.Random) -> int:
    """Choose as dLoRA does: a replica that uses the adapter and has room, else the most idle."""
    holders = [p for p, i in enumerate(replicas) if call.adapter in i.adapters and i.all.size < MAX_BATCH]
    return min(holders, key=lambda place: replicas[place].all.size) if holders else most_idle(replicas, call, rng)


def rank_aware(slo: float, mean_tokens: float) -> Chooser:
    """Make Toppings' chooser: the replica on which one more call costs least, in delay of its own and of the others.

    Replicas whose step stays within the objective come first. The published form scores an empty replica zero, or
    infinity times zero; here the call itself counts among those delayed, and the objective is kept apart from the cost.
    """

    def choose(replicas: Sequence[Replica], call: Call, rng: random.Random) -> int:
        def cost(place: int) -> tuple[bool, float]:
            kernel, batch = replicas[place].kernel, replicas[place].all
            after = kernel.after(batch, call.rank)
            delay = PREFILL * after / mean_tokens + after - kernel.now(batch)
            return after > slo or batch.size >= MAX_BATCH, delay * (batch.size + 1)

        return min(range(len(replicas)), key=cost)

    return choose


def choosers(slo: float, mean_tokens: float) -> dict[str, Chooser]:
    return {
        "random": at_random,
        "first-fit": first_fit,
        "most-idle": most_idle,
        "two-choices": two_choices,
        "dlora-like": with_adapter,
        "rank-aware": rank_aware(slo, mean_tokens),
    }


def functions_trace(
    rate: float, seconds: float, seed: int, functions: int = 40_000, mean_tokens: int = 60
) -> list[Call]:
    """Poisson arrivals over functions of Zipf popularity, each with a rank of its own; log-normal answers."""
    rng = random.Random(seed)
    ranks = [rng.choice(RANKS) for _ in range(functions)]
    total = math.log(functions + 1)
    now = 0.0
    calls: list[Call] = []
    while True:
        now += rng.expovariate(rate)
        if now >= seconds:
            return calls
        function = int(math.exp(rng.random() * total)) - 1
        tokens = max(2, round(mean_tokens * math.exp(rng.gauss(-0.18, 0.6))))
        calls.append(Call(now, function, ranks[function], tokens))


def run(calls: Sequence[Call], choose: Chooser, kernel: Kernel, num_replicas: int, seed: int = 0) -> list[Call]:
    """Serve the calls; each replica steps by itself."""
    rng = random.Random(seed)
    replicas = [Replica(kernel) for _ in range(num_replicas)]
    ends: list[tuple[float, int]] = []
    served = [Call(call.arrival, call.adapter, call.rank, call.tokens) for call in calls]
    place = 0
    while place < len(served) or ends:
        if place < len(served) and (not ends or served[place].arrival <= ends[0][0]):
            call = served[place]
            chosen = choose(replicas, call, rng)
            replicas[chosen].push(call)
            if not replicas[chosen].busy:
                replicas[chosen].busy = True
                heapq.heappush(ends, (replicas[chosen].step(call.arrival), chosen))
            place += 1
            continue
        now, chosen = heapq.heappop(ends)
        replica = replicas[chosen]
        if replica.running or replica.queue:
            heapq.heappush(ends, (replica.step(now), chosen))
        else:
            replica.busy = False
    return served


def compare(
    rate: float, seconds: float, seed: int, kernel: Kernel, num_replicas: int = 60, slo: float = SLO
) -> list[dict[str, Any]]:
    """Simulate every way of choosing, a row each."""
    calls = functions_trace(rate, seconds, seed)
    mean = statistics.fmean(call.tokens for call in calls)
    rows = []
    for name, choose in choosers(slo, mean).items():
        times = [(call.finish - call.arrival) / call.tokens for call in run(calls, choose, kernel, num_replicas, seed)]
        rows.append(
            {
                "placement": name,
                "kernel": kernel.name,
                "rate": rate,
                "seed": seed,
                "requests": len(times),
                "slo_attainment": sum(time <= slo for time in times) / len(times),
                "mean_ms": 1e3 * statistics.fmean(times),
                "p99_ms": 1e3 * statistics.quantiles(times, n=100)[-1],
            }
        )
    return rows


def attainments(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Average attainment over seeds, per rate and way."""
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        groups.setdefault(f"{row['rate']:g} rps", {}).setdefault(row["placement"], []).append(row["slo_attainment"])
    return {rate: {name: statistics.fmean(v) for name, v in ways.items()} for rate, ways in groups.items()}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Format a table of means over seeds."""
    cells: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["kernel"], row["rate"], row["placement"]), []).append(row)
    lines = []
    for (kernel, rate, name), group in cells.items():
        mean = {key: statistics.fmean(row[key] for row in group) for key in ("slo_attainment", "mean_ms", "p99_ms")}
        figures = (f"{mean['slo_attainment']:.1%}", f"{mean['mean_ms']:.1f}", f"{mean['p99_ms']:.1f}")
        lines.append([kernel, f"{rate:g}", name, *figures])
    head = ("kernel", "rate", "placement", "SLO", "mean ms/token", "p99 ms/token")
    return tables.markdown(head, lines, "lrlr") + "\n"
