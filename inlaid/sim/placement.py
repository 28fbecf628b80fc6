"""Which of many instances gets a request whose adapter has a certain rank: after Toppings' figure 19, simulating
continuous batching on each instance.

Adapter kernels are bound by reading adapters, so a decode step takes a constant plus a rate times ranks: times rows of
the largest rank where kernels pad (`padded`), times the sum of ranks where they do not (`exact`). Prefill stops an
instance's decodes. The figure of merit is a request's latency over its tokens, queueing included, and the share of
requests below an objective.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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

    def after(self, batch: Batch, rank: int) -> float:
        """A step with one request more."""
        if self.padded:
            return self.base + self.per_rank * (batch.size + 1) * max(batch.largest, rank)
        return self.base + self.per_rank * (batch.ranks + rank)

    def now(self, batch: Batch) -> float:
        return self.base + self.per_rank * (batch.size * batch.largest if self.padded else batch.ranks)


PADDED = Kernel("padded", 32.675e-3, 1e-3 / 512, True)
EXACT = Kernel("exact", 33.35e-3, 0.6e-3 / 256, False)
KERNELS: Mapping[str, Kernel] = {kernel.name: kernel for kernel in (PADDED, EXACT)}
SLO = 0.04  # seconds per token
ABOUT = (
    "60 instances of at most 32 rows, 40,000 functions of ranks 8 to 64, Zipf popularity, 60 tokens an answer; "
    "latency over tokens, queueing included, against 40 ms; means over three seeds"
)
PREFILL = 1.5  # times a decode step, as the published simulator has it


@dataclass
class Job:
    """A request."""

    arrival: float
    adapter: int
    rank: int
    tokens: int
    left: int = 0
    finish: float = 0.0


@dataclass
class Batch:
    """What placement looks at: everything an instance has, running and queued."""

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


class Instance:
    """One engine: at most MAX_BATCH running, the rest queued; a prefill takes a step of its own."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.running: list[Job] = []
        self.queue: deque[Job] = deque()
        self.all = Batch()
        self.adapters: dict[int, int] = {}
        self.busy = False

    def push(self, job: Job) -> None:
        job.left = job.tokens
        self.queue.append(job)
        self.all.add(job.rank)
        self.adapters[job.adapter] = self.adapters.get(job.adapter, 0) + 1

    def step(self, now: float) -> float:
        """Make the next step; when it ends. Everyone in it has one token more then."""
        if self.queue and len(self.running) < MAX_BATCH:
            self.running.append(self.queue.popleft())
            end = now + PREFILL * self.kernel.decode([job.rank for job in self.running])
            self._made([self.running[-1]], end)
        else:
            end = now + self.kernel.decode([job.rank for job in self.running])
            self._made(self.running, end)
        return end

    def _made(self, jobs: list[Job], end: float) -> None:
        for job in jobs:
            job.left -= 1
            if job.left <= 0:
                job.finish = end
                self.all.add(job.rank, -1)
                self.adapters[job.adapter] -= 1
                if not self.adapters[job.adapter]:
                    del self.adapters[job.adapter]
        self.running = [job for job in self.running if job.left > 0]


Chooser = Callable[[Sequence[Instance], Job, random.Random], int]


def at_random(instances: Sequence[Instance], job: Job, rng: random.Random) -> int:
    return rng.randrange(len(instances))


def first_fit(instances: Sequence[Instance], job: Job, rng: random.Random) -> int:
    """The first with a free place, else the one with least."""
    for place, instance in enumerate(instances):
        if instance.all.size < MAX_BATCH:
            return place
    return most_idle(instances, job, rng)


def most_idle(instances: Sequence[Instance], job: Job, rng: random.Random) -> int:
    return min(range(len(instances)), key=lambda place: instances[place].all.size)


def two_choices(instances: Sequence[Instance], job: Job, rng: random.Random) -> int:
    """The more idle of two drawn at random."""
    one, other = rng.randrange(len(instances)), rng.randrange(len(instances))
    return one if instances[one].all.size <= instances[other].all.size else other


def with_adapter(instances: Sequence[Instance], job: Job, rng: random.Random) -> int:
    """After dLoRA: where the adapter is in use and there is room, else the most idle."""
    holders = [p for p, i in enumerate(instances) if job.adapter in i.adapters and i.all.size < MAX_BATCH]
    return min(holders, key=lambda place: instances[place].all.size) if holders else most_idle(instances, job, rng)


def rank_aware(slo: float, mean_tokens: float) -> Chooser:
    """After Toppings: the instance to which one more costs least, its own delay and everyone's; first those whose step
    stays within the objective. Counting the request itself among those delayed, and keeping the objective apart from
    the cost, mends the published form, in which an empty instance scores zero, or infinity times zero."""

    def choose(instances: Sequence[Instance], job: Job, rng: random.Random) -> int:
        def cost(place: int) -> tuple[bool, float]:
            kernel, batch = instances[place].kernel, instances[place].all
            after = kernel.after(batch, job.rank)
            delay = PREFILL * after / mean_tokens + after - kernel.now(batch)
            return after > slo or batch.size >= MAX_BATCH, delay * (batch.size + 1)

        return min(range(len(instances)), key=cost)

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
) -> list[Job]:
    """Poisson arrivals over functions of Zipf popularity, each with a rank of its own; log-normal answers."""
    rng = random.Random(seed)
    ranks = [rng.choice(RANKS) for _ in range(functions)]
    total = math.log(functions + 1)
    now = 0.0
    jobs: list[Job] = []
    while True:
        now += rng.expovariate(rate)
        if now >= seconds:
            return jobs
        function = int(math.exp(rng.random() * total)) - 1
        tokens = max(2, round(mean_tokens * math.exp(rng.gauss(-0.18, 0.6))))
        jobs.append(Job(now, function, ranks[function], tokens))


def run(jobs: Sequence[Job], choose: Chooser, kernel: Kernel, num_instances: int, seed: int = 0) -> list[Job]:
    """Serve the jobs; each instance steps by itself."""
    rng = random.Random(seed)
    instances = [Instance(kernel) for _ in range(num_instances)]
    ends: list[tuple[float, int]] = []
    served = [Job(job.arrival, job.adapter, job.rank, job.tokens) for job in jobs]
    place = 0
    while place < len(served) or ends:
        if place < len(served) and (not ends or served[place].arrival <= ends[0][0]):
            job = served[place]
            chosen = choose(instances, job, rng)
            instances[chosen].push(job)
            if not instances[chosen].busy:
                instances[chosen].busy = True
                heapq.heappush(ends, (instances[chosen].step(job.arrival), chosen))
            place += 1
            continue
        now, chosen = heapq.heappop(ends)
        instance = instances[chosen]
        if instance.running or instance.queue:
            heapq.heappush(ends, (instance.step(now), chosen))
        else:
            instance.busy = False
    return served


def compare(
    rate: float, seconds: float, seed: int, kernel: Kernel, num_instances: int = 60, slo: float = SLO
) -> list[dict[str, Any]]:
    """One row per way of choosing."""
    jobs = functions_trace(rate, seconds, seed)
    mean = statistics.fmean(job.tokens for job in jobs)
    rows = []
    for name, choose in choosers(slo, mean).items():
        times = [(job.finish - job.arrival) / job.tokens for job in run(jobs, choose, kernel, num_instances, seed)]
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
    """Per rate and way, the mean over seeds."""
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        groups.setdefault(f"{row['rate']:g} rps", {}).setdefault(row["placement"], []).append(row["slo_attainment"])
    return {rate: {name: statistics.fmean(v) for name, v in ways.items()} for rate, ways in groups.items()}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds."""
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
