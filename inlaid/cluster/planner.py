"""Planners: how many replicas there shall be. `BoundsPlanner` follows the bounds of a `[router]` section, `SloPlanner`
predicted misses of an objective. Pure: no clock of their own, no Ray, no torch.

The bounds are BlitzScale's. A replica there prefills or decodes; ours do both. So each pair of bounds yields a number
of replicas, and an engine that does both needs the larger one: prefill bounds are seconds of prompts that wait for each
replica, decode bounds are the share of KV memory in use, migration bounds are seconds of KV transfer and apply only
where prefill and decode are apart (`SplitPlanner`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import msgspec

from inlaid.cluster.view import Prices, ReplicaView


@dataclass(frozen=True)
class Load:
    """The state of all replicas together."""

    replicas: int  # that serve or start
    waiting_tokens: int  # of prompts without output
    used_blocks: int
    resident_tokens: int = 0  # on prefill replicas, to be moved to decode replicas
    requests: int = 0  # that have come since the start
    prompt_tokens: int = 0  # of all of them
    answer: float = 128.0  # tokens of a usual answer


@dataclass(eq=False)
class Demand:
    """The requests that have come since the start, as a front or the simulator counts them."""

    requests: int = 0
    prompt_tokens: int = 0
    answer: float = 128.0  # tokens, averaged over the last answers

    def count(self, prompt_tokens: int) -> None:
        """Count a request."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens

    def learn(self, tokens: int) -> None:
        """Take the length of an answer that has ended into the average."""
        self.answer += 0.02 * (tokens - self.answer)


@dataclass(frozen=True)
class Router:
    """The keys of a `[router]` section and of a model that say when to scale."""

    max_prefill_num: int = 1
    max_decode_num: int = 1
    min_prefill_num: int = 1
    min_decode_num: int = 1
    prefill_lower_bound: float = 0.5
    prefill_upper_bound: float = 0.8
    decode_lower_bound: float = 0.75
    decode_upper_bound: float = 0.95
    migration_lower_bound: float = 0.2
    migration_upper_bound: float = 0.4
    scale_down_threshold_millis: float = 333.0
    mock_load_millis: float = 0.0
    mock_transfer_millis: float = 0.0
    tokens_prefilled_per_sec: float = 12_000.0
    tokens_transferred_per_sec: float = 60_000.0
    num_available_blocks: int = 8000

    def __post_init__(self) -> None:
        for kind in ("prefill", "decode"):
            if not 1 <= getattr(self, f"min_{kind}_num") <= getattr(self, f"max_{kind}_num"):
                raise ValueError(f"router: min_{kind}_num must be at least 1 and at most max_{kind}_num")
        for kind in ("prefill", "decode", "migration"):
            if not 0 < getattr(self, f"{kind}_lower_bound") <= getattr(self, f"{kind}_upper_bound"):
                raise ValueError(f"router: {kind}_lower_bound must be above 0 and at most {kind}_upper_bound")

    @property
    def least(self) -> int:
        """The fewest replicas that do both."""
        return max(self.min_prefill_num, self.min_decode_num)

    @property
    def most(self) -> int:
        """The most replicas that do both."""
        return max(self.max_prefill_num, self.max_decode_num)


def router_of(section: Mapping[str, Any], model: Mapping[str, Any]) -> Router:
    """Read the scaling keys of a template's [router] and of a model; an unknown one is refused by name."""
    known = {each.name for each in fields(Router)}
    unknown = sorted(set(section) - known - {"port"})
    if unknown:
        raise ValueError(f"[router] has no key {unknown[0]!r}; known: port, {', '.join(sorted(known))}")
    values = {key: value for key, value in section.items() if key != "port"}
    values |= {key: value for key, value in model.items() if key in known}
    try:
        return msgspec.convert(values, Router, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"[router]: {error}") from error


class Planner(Protocol):
    """A way to say how many replicas there shall be."""

    def wanted(self, load: Load, views: Sequence[ReplicaView], now: float) -> int:
        """Return the number of replicas wanted now."""
        ...


def interval(amount: float, lower: float, upper: float) -> tuple[int, int]:
    """Return the fewest and most replicas that keep an amount between the bounds for each of them."""
    return math.ceil(amount / upper - 1e-9), math.ceil(amount / lower - 1e-9)


class _Steps:
    """The way from a number of replicas into an interval: to its middle at once when there are too few, down one at a
    time when there have been too many for `threshold` seconds."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._since: float | None = None  # there have been too many

    def next(self, count: int, fewest: int, most: int, limits: tuple[int, int], now: float) -> int:
        """Return the number wanted now."""
        if count <= most or count <= limits[0]:
            self._since = None
        if count < fewest:
            count = math.ceil((fewest + most) / 2)
        elif count > most:
            self._since = now if self._since is None else self._since
            if now - self._since >= self._threshold:
                count -= 1
                self._since = now
        return min(max(count, limits[0]), limits[1])


def _intervals(router: Router, load: Load) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the numbers of replicas that the waiting prompts need, and the KV blocks in use."""
    seconds = load.waiting_tokens / router.tokens_prefilled_per_sec
    used = load.used_blocks / router.num_available_blocks
    return (
        interval(seconds, router.prefill_lower_bound, router.prefill_upper_bound),
        interval(used, router.decode_lower_bound, router.decode_upper_bound),
    )


class BoundsPlanner:
    """Keep every quantity within its bounds, on replicas that prefill and decode: the larger number holds."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._steps = _Steps(router.scale_down_threshold_millis / 1e3)

    def wanted(self, load: Load, views: Sequence[ReplicaView], now: float) -> int:
        fewest, most = (max(each) for each in zip(*_intervals(self.router, load)))
        return self._steps.next(load.replicas, fewest, most, (self.router.least, self.router.most), now)


@dataclass(frozen=True)
class Split:
    """Numbers of replicas that prefill and that decode."""

    prefill: int
    decode: int


class SplitPlanner:
    """Keep every quantity within its bounds where prefill and decode are apart. KV that waits for its transfer counts
    for both, as seconds on the links of the replicas that decode."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._prefill, self._decode = (_Steps(router.scale_down_threshold_millis / 1e3) for _ in range(2))

    def wanted(self, load: Load, split: Split, now: float) -> Split:
        """Return the numbers wanted now."""
        router = self.router
        prefill, decode = _intervals(router, load)
        moving = load.resident_tokens / (max(1, split.decode) * router.tokens_transferred_per_sec)
        migration = interval(moving, router.migration_lower_bound, router.migration_upper_bound)
        return Split(
            self._prefill.next(
                split.prefill,
                max(prefill[0], migration[0]),
                max(prefill[1], migration[1]),
                (router.min_prefill_num, router.max_prefill_num),
                now,
            ),
            self._decode.next(
                split.decode,
                max(decode[0], migration[0]),
                max(decode[1], migration[1]),
                (router.min_decode_num, router.max_decode_num),
                now,
            ),
        )


@dataclass(eq=False)
class SloPlanner:
    """The fewest replicas on which at most a share `misses` of the requests are predicted to miss the objective.

    The rate and the mean length of prompts are those of the last seconds, over the shorter of two windows if they were
    higher there; prices turn them into the seconds that prompts and steps take on each of n replicas (`_late`). What
    was wanted at most in the last `hold` seconds is wanted still.
    """

    least: int
    most: int
    prices: Prices = field(default_factory=Prices)
    ttft: float = 1.0
    tpot: float = 0.1
    hold: float = 10.0
    misses: float = 0.01
    _seen: deque[tuple[float, int, int]] = field(default_factory=deque)  # seconds, requests and tokens by then
    _needed: deque[tuple[float, int]] = field(default_factory=deque)

    WINDOWS = (2.0, 6.0)
    DRAIN = 5.0  # seconds in which prompts that wait by now are to be computed
    HEADROOM = 1.1  # of the rate: it is estimated from few requests

    def wanted(self, load: Load, views: Sequence[ReplicaView], now: float) -> int:
        rate, prompt = self._rate(load, now)
        numbers = range(self.least, self.most)
        fits = (count for count in numbers if self._late(count, rate, prompt, load, views) <= self.misses)
        self._needed.append((now, next(fits, self.most)))
        while self._needed[0][0] < now - self.hold:
            self._needed.popleft()
        return max(count for _, count in self._needed)

    def _rate(self, load: Load, now: float) -> tuple[float, float]:
        """Return requests a second, and the mean tokens of their prompts."""
        self._seen.append((now, load.requests, load.prompt_tokens))
        while self._seen[0][0] < now - max(self.WINDOWS):
            self._seen.popleft()
        rate, prompt = 0.0, load.prompt_tokens / max(1, load.requests)
        for window in self.WINDOWS:
            began, requests, tokens = next(each for each in self._seen if each[0] >= now - window)
            if (come := load.requests - requests) / window > rate:
                rate, prompt = come / max(window / 2, now - began), (load.prompt_tokens - tokens) / come
        return self.HEADROOM * rate, prompt

    def _late(self, count: int, rate: float, prompt: float, load: Load, views: Sequence[ReplicaView]) -> float:
        """Predict the share of requests that would miss the objective on `count` replicas.

        Prompts keep a replica busy for a share of the time, in which decodes stand still. The rows of a step are the
        requests that come while one is answered (Little's law), or those that run now. A first token waits as in a
        queue with exponential service."""
        prices, share = self.prices, rate / count
        own = max(1e-9, prices.prefill_seconds(round(prompt)))
        busy = share * own + prices.prefill_seconds(load.waiting_tokens, 0) / self.DRAIN / count
        if busy >= 1.0:
            return 1.0
        adapters = sum(len(view.adapters) for view in views) / max(1, len(views))
        ranks = sum(view.ranks for view in views) / max(1, len(views))
        constant = prices.step + prices.adapter * adapters + prices.rank * ranks
        each_row = prices.decode + prices.context * prompt
        turnover = share * load.answer / (1.0 - busy)  # rows for each second of a step
        if turnover * each_row >= 1.0:
            return 1.0
        step = max(prices.floor, constant / (1.0 - turnover * each_row))
        rows = max(turnover * step, sum(view.num_running for view in views) / count)
        step = max(step, constant + rows * each_row)
        if step / (1.0 - busy) > self.tpot or any(rows > view.seats for view in views):
            return 1.0
        left = self.ttft - step - own / (1.0 - busy)
        return busy * math.exp(-left * (1.0 - busy) / own) if left > 0 else 1.0
