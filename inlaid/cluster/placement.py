"""Placement: which replica gets a request. Ours is `Predicted`; the others are what it is compared with.

Every placement answers `choose`: a replica's name, or None to be asked again soon. `now` is any clock's seconds.
Pure: the simulator and the cluster's client run the same objects.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Protocol

from inlaid.cluster.view import Ask, Prices, ReplicaView


class Placement(Protocol):
    """A way to choose a replica."""

    def choose(self, ask: Ask, views: Sequence[ReplicaView], now: float) -> str | None:
        """Return the name of one of these replicas, all of them open and at least one; None: none yet."""
        ...


class AtRandom:
    """Any replica."""

    def __init__(self, prices: Prices, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def choose(self, ask: Ask, views: Sequence[ReplicaView], now: float) -> str | None:
        return self._random.choice(views).name


class RoundRobin:
    """One replica after the other."""

    def __init__(self, prices: Prices, seed: int = 0) -> None:
        self._turn = seed

    def choose(self, ask: Ask, views: Sequence[ReplicaView], now: float) -> str | None:
        self._turn += 1
        return views[self._turn % len(views)].name


class LeastLoaded:
    """The replica with the fewest requests."""

    def __init__(self, prices: Prices, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def choose(self, ask: Ask, views: Sequence[ReplicaView], now: float) -> str | None:
        return min(views, key=lambda view: (view.size, self._random.random())).name


@dataclass
class _Tries:
    """The attempts of a request under Ray's rule."""

    until: float
    first: bool = False  # the replicas that hold the model were tried
    fewest: bool = False  # those with the fewest models were, after the time for matching


class Multiplexed:
    """Ray Serve's rule for multiplexed models (2.60, `MultiplexMixin.apply_multiplex_routing`): first the replicas that
    hold the model, or those with the fewest models if none does; then those with the fewest; after `MATCHING_SECONDS`
    those once more, then all. Of these the less busy of two drawn ones, unless it is full: then asked again."""

    MATCHING_SECONDS = 1.0

    def __init__(self, prices: Prices, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._tries: dict[str, _Tries] = {}
        self._fell_back: set[str] = set()  # models that nobody held when they were last asked for

    def choose(self, ask: Ask, views: Sequence[ReplicaView], now: float) -> str | None:
        tries = self._tries.setdefault(ask.id, _Tries(now + self.MATCHING_SECONDS * self._random.uniform(1.0, 2.0)))
        candidates = views if ask.adapter is None else self._candidates(ask.adapter, views, tries, now)
        drawn = self._random.sample(candidates, min(2, len(candidates)))
        best = min(drawn, key=lambda view: view.size, default=None)
        if best is None or best.size >= best.seats:
            return None
        del self._tries[ask.id]
        return best.name

    def _candidates(self, model: str, views: Sequence[ReplicaView], tries: _Tries, now: float) -> Sequence[ReplicaView]:
        least = min(len(view.resident) for view in views)
        fewest = [view for view in views if len(view.resident) == least]
        if now >= tries.until:
            known, tries.fewest = tries.fewest, True
            return views if known else fewest
        holders = [view for view in views if view.has(model)]
        tried, tries.first = tries.first, True
        if tried or (not holders and model not in self._fell_back):
            self._fell_back.add(model)
            return fewest
        if holders:
            self._fell_back.discard(model)
        return holders


class RankAware:
    """Toppings' algorithm 1: least added delay, of the request itself and of those beside it, times their number.

    Its edge cases are mended as in `sim/placement.py`: the request counts itself, and full replicas come last.
    """

    def __init__(self, prices: Prices, seed: int = 0) -> None:
        self._prices = prices
        self._random = random.Random(seed)

    def choose(self, ask: Ask, views: Sequence[ReplicaView], now: float) -> str | None:
        def cost(view: ReplicaView) -> tuple[bool, float, float]:
            before = _step(self._prices, view, None)
            added = _step(self._prices, view, ask) - before
            prefill = self._prices.prefill_seconds(ask.prompt)
            delay = prefill / max(1.0, ask.output) + added
            return view.size >= view.seats, delay * (view.size + 1), self._random.random()

        return min(views, key=cost).name


@dataclass
class _Demand:
    """An adapter's recent work, in seconds of a replica for each second, and how many replicas it may use."""

    rate: float = 0.0
    at: float = 0.0
    spread: int = 1


@dataclass(eq=False)
class Predicted:
    """Least predicted seconds until the answer is whole, among a bounded set of replicas for each adapter.

    The set is the first `spread` replicas in the adapter's own order (rendezvous hashing), so each replica sees few
    adapters and keeps them. `spread` follows the adapter's demand: it grows as soon as its replicas would be busy with
    it for more than `most_busy` of the time, and shrinks when one fewer would be busy for less than `least_busy`. A
    request leaves the set only if that gains more than `spill` times the load that it causes and `patience` bare steps.
    The `tail` whose first tokens would come last leave for the replica of the earliest first token, for less patience.
    """

    prices: Prices
    seed: int = 0
    most_busy: float = 0.3
    least_busy: float = 0.15
    memory: float = 10.0  # seconds over which demand is averaged
    spill: float = 2.0  # the adapter is loaded, and so will be the one that it pushes out
    patience: float = 25.0
    objective: float = math.inf  # seconds for each token after the first
    tail: float = 0.05  # share of the requests whose first token would come last: these may leave for less
    tail_patience: float = 1.0
    _demand: dict[str, _Demand] = field(default_factory=dict)
    _latest: float = 0.0  # predicted seconds to the first token that only the tail exceeds

    MAX_REMEMBERED = 20_000  # adapters

    def choose(self, ask: Ask, views: Sequence[ReplicaView], now: float) -> str | None:
        ordered = list(views) if ask.adapter is None else in_order(ask.adapter, views)
        spread = len(ordered) if ask.adapter is None else min(len(ordered), self._spread(ask, now))
        at_home = min(ordered[:spread], key=lambda view: self.seconds(view, ask))
        if spread == len(ordered):
            return at_home.name
        abroad = min(ordered[spread:], key=lambda view: self.seconds(view, ask))
        if self.seconds(at_home, ask) - self.seconds(abroad, ask) > self._price(abroad, ask, self.patience):
            return abroad.name
        first = self.until_first(at_home, ask)
        if not self._is_late(first):
            return at_home.name
        abroad = min(ordered, key=lambda view: self.until_first(view, ask))
        late = first - self.until_first(abroad, ask)
        return abroad.name if late > self._price(abroad, ask, self.tail_patience) else at_home.name

    def _price(self, view: ReplicaView, ask: Ask, steps: float) -> float:
        """Return the seconds that a request must gain to leave its set for a replica."""
        load = 0.0 if view.has(ask.adapter) else self.spill * self.prices.load_seconds(ask.rank)
        return load + steps * max(self.prices.step, self.prices.floor)

    def _is_late(self, first: float) -> bool:
        """Tell whether a predicted first token is among the `tail` that come last, and follow where these begin."""
        late = first > self._latest
        self._latest = max(1e-3, self._latest * (1 + 0.1 * (late - self.tail)))
        return late

    def hot(self, view: ReplicaView, views: Sequence[ReplicaView], most: int) -> list[str]:
        """List the adapters in demand whose set this replica belongs to, the busiest first."""
        busiest = sorted(self._demand, key=lambda name: -self._demand[name].rate)
        mine = (name for name in busiest if view in in_order(name, views)[: self._demand[name].spread])
        return list(itertools.islice(mine, most))

    def seconds(self, view: ReplicaView, ask: Ask) -> float:
        """Predict the seconds from now to the whole answer on a replica. Where its steps would be longer than the
        objective allows, what its requests' tokens are late counts too."""
        step = _step(self.prices, view, ask)
        late = max(0.0, step - self.objective) * view.expected
        return self.until_first(view, ask) + ask.output * step + late + view.silent

    def until_first(self, view: ReplicaView, ask: Ask) -> float:
        """Predict the seconds from now to the first token: the prompts ahead and a seat, or the adapter's load
        meanwhile; then its own prompt, less what the prefix cache saves."""
        prices = self.prices
        step = _step(prices, view, ask)
        queue = view.pace * prices.prefill_seconds(view.waiting_tokens, view.num_waiting)
        missing = view.size + 1 - view.seats
        if missing > 0:
            queue += missing * step * view.expected / view.size / view.seats
        load = 0.0
        if not view.has(ask.adapter):
            load = prices.load_seconds(ask.rank, view.on_host is None or ask.adapter in view.on_host)
        return step + max(queue, load) + view.pace * prices.prefill_seconds(ask.prompt - view.cached(ask))

    def _spread(self, ask: Ask, now: float) -> int:
        """Count a request into its adapter's demand, and return how many replicas the adapter may use."""
        assert ask.adapter is not None
        if ask.adapter not in self._demand and len(self._demand) >= self.MAX_REMEMBERED:
            oldest = sorted(self._demand, key=lambda name: self._demand[name].at)
            for name in oldest[: len(oldest) // 2]:
                del self._demand[name]
        demand = self._demand.setdefault(ask.adapter, _Demand(at=now))
        demand.rate *= math.exp(min(0.0, demand.at - now) / self.memory)
        demand.rate += self._work(ask) / self.memory
        demand.at = now
        while demand.rate > demand.spread * self.most_busy:
            demand.spread += 1
        while demand.spread > 1 and demand.rate < (demand.spread - 1) * self.least_busy:
            demand.spread -= 1
        return demand.spread

    def _work(self, ask: Ask) -> float:
        """Return the seconds of a replica that a request takes: rows of steps, its adapter's part and its prompt."""
        prices = self.prices
        own = prices.decode + prices.context * ask.prompt + prices.adapter + prices.rank * ask.rank
        shared = max(prices.step, prices.floor) / 16  # of a step's constant part, at a usual number of rows
        return ask.output * (own + shared) + prices.prefill_seconds(ask.prompt)


def _step(prices: Prices, view: ReplicaView, ask: Ask | None) -> float:
    """Predict a decode step of a replica with all its requests, and one more."""
    rows, adapters, ranks, context = view.size, len(view.adapters), view.ranks, view.context
    if ask is not None:
        rows, context = rows + 1, context + ask.prompt
        if ask.adapter is not None and ask.adapter not in view.adapters:
            adapters, ranks = adapters + 1, ranks + ask.rank
    running = min(1.0, view.seats / max(1, rows))  # the rest waits
    return view.pace * prices.step_seconds(rows * running, adapters, ranks, context * running)


def in_order(adapter: str, views: Sequence[ReplicaView]) -> list[ReplicaView]:
    """Sort replicas by rendezvous hashing: a replica that comes or goes changes no other's place."""
    return sorted(views, key=lambda view: _weight(adapter, view.name))


@lru_cache(maxsize=1 << 17)
def _weight(adapter: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{replica}\0{adapter}".encode(), digest_size=8).digest()


PLACEMENTS: Mapping[str, Callable[[Prices, int], Placement]] = MappingProxyType(
    {
        "random": AtRandom,
        "round-robin": RoundRobin,
        "least-loaded": LeastLoaded,
        "multiplexed": Multiplexed,
        "rank-aware": RankAware,
        "predicted": Predicted,
    }
)


def make_placement(name: str, prices: Prices, seed: int = 0, objective: float = math.inf) -> Placement:
    """Make a placement by name. `objective`: seconds for each token after the first, which `predicted` aims at."""
    if name not in PLACEMENTS:
        raise ValueError(f"unknown placement {name!r}; known: {', '.join(PLACEMENTS)}")
    made = PLACEMENTS[name](prices, seed)
    if isinstance(made, Predicted):
        made.objective = objective
    return made
