"""Planners: how many replicas there shall be. `BoundsPlanner` follows the bounds of a `[router]` section, `SloPlanner`
predicted misses of an objective. Pure: no clock of their own, no Ray, no torch.

The bounds are BlitzScale's. A replica there prefills or decodes; ours do both. So each pair of bounds yields a number
of replicas, and an engine that does both needs the larger one: prefill bounds are seconds of prompts that wait for each
replica, decode bounds are the share of KV memory in use, migration bounds are seconds of KV transfer and apply only
where prefill and decode are apart (`split_wanted`).
"""

from __future__ import annotations

import math
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


@dataclass(eq=False)
class BoundsPlanner:
    """Keep every quantity within its bounds: jump to the middle of the interval when there are too few replicas, go
    down one at a time when there are too many for `scale_down_threshold_millis`."""

    router: Router
    _too_many_since: float | None = None

    def wanted(self, load: Load, views: Sequence[ReplicaView], now: float) -> int:
        router = self.router
        seconds = load.waiting_tokens / router.tokens_prefilled_per_sec
        used = load.used_blocks / router.num_available_blocks
        intervals = (
            interval(seconds, router.prefill_lower_bound, router.prefill_upper_bound),
            interval(used, router.decode_lower_bound, router.decode_upper_bound),
        )
        fewest, most = (max(each[side] for each in intervals) for side in (0, 1))
        return self._step(load.replicas, fewest, most, router.least, router.most, now)

    def _step(self, count: int, fewest: int, most: int, least: int, limit: int, now: float) -> int:
        if count <= most or count <= least:
            self._too_many_since = None
        if count < fewest:
            count = math.ceil((fewest + most) / 2)
        elif count > most:
            since = self._too_many_since = now if self._too_many_since is None else self._too_many_since
            if now - since >= self.router.scale_down_threshold_millis / 1e3:
                count -= 1
                self._too_many_since = now
        return min(max(count, least), limit)


@dataclass(frozen=True)
class Split:
    """Numbers of replicas that prefill and that decode."""

    prefill: int
    decode: int


def split_wanted(router: Router, load: Load, now: Split) -> Split:
    """Return the numbers wanted where prefill and decode are apart, before they shrink one at a time."""
    seconds = load.waiting_tokens / router.tokens_prefilled_per_sec
    used = load.used_blocks / router.num_available_blocks
    moving = load.resident_tokens / (max(1, now.decode) * router.tokens_transferred_per_sec)
    prefill = interval(seconds, router.prefill_lower_bound, router.prefill_upper_bound)
    decode = interval(used, router.decode_lower_bound, router.decode_upper_bound)
    migration = interval(moving, router.migration_lower_bound, router.migration_upper_bound)

    def grown(count: int, own: tuple[int, int], least: int, most: int) -> int:
        fewest, highest = max(own[0], migration[0]), max(own[1], migration[1])
        if count < fewest:
            count = math.ceil((fewest + highest) / 2)
        elif count > highest:
            count -= 1
        return min(max(count, least), most)

    return Split(
        grown(now.prefill, prefill, router.min_prefill_num, router.max_prefill_num),
        grown(now.decode, decode, router.min_decode_num, router.max_decode_num),
    )


@dataclass(eq=False)
class SloPlanner:
    """Keep as few replicas as miss no objective: one more for every two that would answer a new request too late,
    and one fewer when the rest could take its work and still be in time, for `hold` seconds."""

    least: int
    most: int
    prices: Prices = field(default_factory=Prices)
    ttft: float = 1.0
    tpot: float = 0.1
    hold: float = 10.0
    _idle_since: float | None = None

    def wanted(self, load: Load, views: Sequence[ReplicaView], now: float) -> int:
        count = load.replicas
        share = len(views) / max(1, count)  # of the work that a replica keeps when those that start serve too
        late = sum(self._is_late(view, share) for view in views)
        if late:
            self._idle_since = None
            return min(self.most, max(self.least, count + math.ceil(late / 2)))
        if count > self.least and self._fits_on(views, count - 1):
            self._idle_since = now if self._idle_since is None else self._idle_since
            if now - self._idle_since >= self.hold:
                self._idle_since = now
                count -= 1
        else:
            self._idle_since = None
        return min(self.most, max(self.least, count))

    def _is_late(self, view: ReplicaView, factor: float = 1.0) -> bool:
        """Tell whether a replica with `factor` times its work would miss the objective on one more request."""
        prices = self.prices
        rows = view.size * factor + 1
        first = prices.prefill_seconds(round(view.waiting_tokens * factor), round(view.num_waiting * factor) + 1)
        step = prices.step_seconds(min(rows, view.seats), len(view.adapters), view.ranks, view.context * factor)
        return first > self.ttft / 2 or step > self.tpot or rows > view.seats  # half: more comes while a replica starts

    def _fits_on(self, views: Sequence[ReplicaView], count: int) -> bool:
        if not views or count < 1:
            return False
        factor = 1.25 * (count + 1) / count  # room for what arrives meanwhile
        return not any(self._is_late(view, factor) for view in views)
