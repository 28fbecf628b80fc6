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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from inlaid.workload.functions import Functions, synthetic

RANKS = (8, 16, 32, 64)
MAX_BATCH = 32
MIGRATION_PERIOD = 0.5  # seconds between two looks at the queues
DLORA = "dlora-like"


@dataclass(frozen=True)
class Kernel:
    """Seconds of a decode step and of a prefill, and how many replicas with it are compared.

    The figures of `PADDED` and `EXACT` are those of the published worked case (24 rows of rank 32 against 16 of rank
    64, before and after one more of rank 64); as in the published simulator a prefill takes 1.5 times a decode step.
    """

    name: str
    base: float
    per_rank: float
    padded: bool
    per_row: float = 0.0
    prefill_share: float = 1.5  # of a decode step of the same requests
    prefill_more: float = 0.0
    slo: float = 0.04  # seconds per token
    replicas: int = 60
    mixes: bool = False  # prefills take part in the steps of decodes, as many as have seats
    load_rank: float = 0.0  # seconds to bring an adapter to another replica, for each of its ranks

    def decode(self, ranks: Sequence[int]) -> float:
        work = len(ranks) * max(ranks, default=0) if self.padded else sum(ranks)
        return self.base + self.per_row * len(ranks) + self.per_rank * work

    def after(self, batch: Occupancy, rank: int) -> float:
        """Predict a step with one more request."""
        largest = (batch.size + 1) * max(batch.largest, rank)
        work = largest if self.padded else batch.ranks + rank
        return self.base + self.per_row * (batch.size + 1) + self.per_rank * work

    def now(self, batch: Occupancy) -> float:
        work = batch.size * batch.largest if self.padded else batch.ranks
        return self.base + self.per_row * batch.size + self.per_rank * work

    def mixed(self, ranks: Sequence[int], fresh: int) -> float:
        """Return the seconds of a step whose last `fresh` requests are prefills."""
        return self.decode(ranks) + fresh * self.prefill_more

    def prefill(self, decode: float) -> float:
        """Return the seconds of a prefill beside requests whose decode step takes `decode`."""
        return self.prefill_share * decode + self.prefill_more


PADDED = Kernel("padded", 32.675e-3, 1e-3 / 512, True)
EXACT = Kernel("exact", 33.35e-3, 0.6e-3 / 256, False)


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
    """One engine: at most MAX_BATCH running, the rest queued; unless its kernel mixes them, a prefill takes a step of
    its own."""

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

    def pop(self) -> Call:
        """Give up the request that was queued last."""
        call = self.queue.pop()
        self._forget(call)
        return call

    def step(self, now: float) -> float:
        """Make the next step and return when it ends; every request in it then has one more token."""
        if self.kernel.mixes:
            fresh = min(len(self.queue), MAX_BATCH - len(self.running))
            self.running += [self.queue.popleft() for _ in range(fresh)]
            end = now + self.kernel.mixed([call.rank for call in self.running], fresh)
            self._made(self.running, end)
        elif self.queue and len(self.running) < MAX_BATCH:
            self.running.append(self.queue.popleft())
            end = now + self.kernel.prefill(self.kernel.decode([call.rank for call in self.running]))
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
                self._forget(call)
        self.running = [call for call in self.running if call.left > 0]

    def _forget(self, call: Call) -> None:
        self.all.add(call.rank, -1)
        self.adapters[call.adapter] -= 1
        if not self.adapters[call.adapter]:
            del self.adapters[call.adapter]


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
            delay = kernel.prefill(after) / mean_tokens + after - kernel.now(batch)
            return after > slo or batch.size >= MAX_BATCH, delay * (batch.size + 1)

        return min(range(len(replicas)), key=cost)

    return choose


def choosers(slo: float, mean_tokens: float) -> dict[str, Chooser]:
    return {
        "random": at_random,
        "first-fit": first_fit,
        "most-idle": most_idle,
        "two-choices": two_choices,
        DLORA: with_adapter,
        "rank-aware": rank_aware(slo, mean_tokens),
    }


def functions_trace(
    rate: float, seconds: float, seed: int, functions: Functions | None = None, mean_tokens: int = 60
) -> list[Call]:
    """Return the first `seconds` of a minute of a trace of functions, thinned to a rate. Each function has a rank of
    its own; answers are log-normal. Without a trace, one of the published statistics is drawn."""
    rng = random.Random(seed)
    known = synthetic(seed=seed) if functions is None else functions
    ranks = [rng.choice(RANKS) for _ in range(len(known.counts))]
    minute = seed % known.counts.shape[1]
    called = known.calls(minute, seed)
    share = rate * 60.0 / max(1, len(called))
    calls: list[Call] = []
    for copy in range(math.ceil(share)):  # a rate above the trace's own takes calls more than once
        for at, function in called:
            if rng.random() < share - copy and at < seconds:
                tokens = max(2, round(mean_tokens * math.exp(rng.gauss(-0.18, 0.6))))
                calls.append(Call(at if not copy else rng.random() * seconds, function, ranks[function], tokens))
    return sorted(calls, key=lambda call: call.arrival)


def run(
    calls: Sequence[Call], choose: Chooser, kernel: Kernel, num_replicas: int, seed: int = 0, migrates: bool = False
) -> list[Call]:
    """Serve the calls; each replica steps by itself. With `migrates`, queued calls move as `_migrate` says."""
    rng = random.Random(seed)
    replicas = [Replica(kernel) for _ in range(num_replicas)]
    ends: list[tuple[float, int]] = []
    served = [Call(call.arrival, call.adapter, call.rank, call.tokens) for call in calls]
    place, next_look = 0, MIGRATION_PERIOD

    def begin(chosen: int, now: float) -> None:
        if not replicas[chosen].busy:
            replicas[chosen].busy = True
            heapq.heappush(ends, (replicas[chosen].step(now), chosen))

    while place < len(served) or ends:
        if place < len(served) and (not ends or served[place].arrival <= ends[0][0]):
            call = served[place]
            chosen = choose(replicas, call, rng)
            replicas[chosen].push(call)
            begin(chosen, call.arrival)
            place += 1
            continue
        now, chosen = heapq.heappop(ends)
        replica = replicas[chosen]
        replica.busy = False
        if replica.running or replica.queue:
            begin(chosen, now)
        if migrates and now >= next_look:
            next_look = now + MIGRATION_PERIOD
            for taker, delay in _migrate(replicas):
                begin(taker, now + delay)
    return served


def _migrate(replicas: Sequence[Replica]) -> Iterator[tuple[int, float]]:
    """Move queued calls from the longest queues to replicas with free seats, as dLoRA's migration evens out load; yield
    each taker and how long it waits for the adapter, if it has no request that uses it."""
    while True:
        giver = max(replicas, key=lambda each: len(each.queue))
        taker = min(range(len(replicas)), key=lambda place: replicas[place].all.size)
        if len(giver.queue) < 1 or replicas[taker].all.size >= min(MAX_BATCH, giver.all.size - 1):
            return
        call = giver.pop()
        known = call.adapter in replicas[taker].adapters
        replicas[taker].push(call)
        yield taker, 0.0 if known else giver.kernel.load_rank * call.rank
