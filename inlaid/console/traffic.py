"""Traffic: counts and latencies of the answers that a server makes, by adapter, and the last requests for a replay.

The server's meters report here for each piece of an answer, so a report is a few additions. `roll` is called once a
second; everything has a bound.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import msgspec

from inlaid.engine.request import FinishReason, NewRequest

_FINEST = 1e-4  # seconds; shorter latencies count as this
_RATIO = math.log(1.08)  # between the edges of two buckets: a percentile is right to 4%
_BUCKETS = 220
_SECONDS_PER_SLOT = 60  # of an adapter's window, and of a point of its history
_HISTORY = 60  # points
PERCENTILES = (0.5, 0.99)


class Window:
    """Latencies of the last slots, as sparse histograms."""

    def __init__(self, num_slots: int) -> None:
        self._slots: deque[dict[int, int]] = deque([{}], maxlen=num_slots)

    def add(self, seconds: float) -> None:
        """Count a latency."""
        place = 0 if seconds <= _FINEST else min(_BUCKETS, int(math.log(seconds / _FINEST) / _RATIO) + 1)
        now = self._slots[-1]
        now[place] = now.get(place, 0) + 1

    def roll(self) -> None:
        """Begin a new slot; the oldest is forgotten."""
        self._slots.append({})

    def percentiles(self, shares: Sequence[float] = PERCENTILES, last: int = 0) -> list[float | None]:
        """Return these percentiles in seconds over all slots, or over the `last`; None: there is nothing."""
        merged: dict[int, int] = {}
        for slot in list(self._slots)[-last:]:
            for place, count in slot.items():
                merged[place] = merged.get(place, 0) + count
        total = sum(merged.values())
        if not total:
            return [None] * len(shares)
        found, seen, wanted = [], 0, deque(sorted(shares))
        for place in sorted(merged):
            seen += merged[place]
            while wanted and seen >= wanted[0] * total:
                found.append(_rounded(_FINEST * math.exp(max(0, place - 0.5) * _RATIO)))
                wanted.popleft()
        return list(found)


def _rounded(seconds: float) -> float:
    """Return a latency to three digits, which is more than a bucket tells."""
    return float(f"{seconds:.3g}")


class Served(msgspec.Struct, frozen=True, gc=False):
    """A request that has been answered, as a replay needs it."""

    arrival: float  # monotonic seconds
    tenant: str
    adapter: str | None
    num_prompt: int
    num_outputs: int
    max_tokens: int
    priority: int = 0
    deadline: float | None = None  # monotonic seconds


UNUSED = (0, 0, 0, 0, 0, None, None, None, None, None)  # the row of an adapter that nobody has asked


class AdapterTraffic:
    """The answers of one adapter, or of the base."""

    def __init__(self) -> None:
        self.queued = self.running = 0  # requests before and after their first token
        self.requests = self.tokens = 0
        self.deadlines = self.met = 0  # requests that ended and had a deadline, and those that kept it
        self.last_used = 0.0  # Unix seconds
        self.first, self.between = Window(2), Window(2)
        self.history: deque[tuple[float, ...]] = deque(maxlen=_HISTORY)
        self.changed = True  # since `row` was last made
        self.slowest = 0.0  # time to first token since this was last set to 0
        self._row: tuple[object, ...] = ()

    def row(self) -> tuple[object, ...]:
        """Return queue, running, requests, tokens, last use, attainment, TTFT and inter-token percentiles."""
        if self.changed:
            attained = round(self.met / self.deadlines, 4) if self.deadlines else None
            counts = (self.queued, self.running, self.requests, self.tokens, round(self.last_used))
            self._row = (*counts, attained, *self.first.percentiles(), *self.between.percentiles())
            self.changed = False
        return self._row

    def roll(self, when: float) -> None:
        """End a slot and keep its percentiles."""
        latencies = (*self.first.percentiles(last=1), *self.between.percentiles(last=1))
        if any(value is not None for value in latencies):
            self.history.append((round(when), *(0.0 if value is None else value for value in latencies)))
        self.first.roll()
        self.between.roll()
        self.changed = True


class Flight:
    """One answer on its way, as the meter reports it."""

    def __init__(self, traffic: Traffic, one: AdapterTraffic, request: NewRequest, arrival: float) -> None:
        self._traffic, self._one, self._request, self._arrival = traffic, one, request, arrival
        self._begun = False
        one.queued += 1
        one.requests += 1
        one.last_used = traffic.wall()
        one.changed = True
        traffic.num_requests += 1

    def first(self, seconds: float, num_tokens: int) -> None:
        """Report the first piece of the answer."""
        one, self._begun = self._one, True
        one.queued -= 1
        one.running += 1
        one.first.add(seconds)
        one.slowest = max(one.slowest, seconds)
        self._traffic.first.add(seconds)
        self._count(num_tokens)

    def between(self, seconds: float, num_tokens: int) -> None:
        """Report a later piece."""
        self._one.between.add(seconds)
        self._traffic.between.add(seconds)
        self._count(num_tokens)

    def _count(self, num_tokens: int) -> None:
        self._one.tokens += num_tokens
        self._one.changed = True
        self._traffic.num_tokens += num_tokens

    def end(self, reason: str | None, num_tokens: int, now: float) -> None:
        """Report the end, by a finish reason or None: the client left, or the request was refused or failed."""
        one, request = self._one, self._request
        if self._begun:
            one.running -= 1
        else:
            one.queued -= 1
        one.changed = True
        one.last_used = self._traffic.wall()
        if reason not in (FinishReason.STOP.value, FinishReason.LENGTH.value):
            return
        if request.deadline is not None:
            one.deadlines += 1
            one.met += now <= request.deadline
        served = Served(
            self._arrival,
            request.tenant,
            request.adapter,
            len(request.prompt),
            num_tokens,
            request.params.max_tokens,
            request.priority,
            request.deadline,
        )
        self._traffic.served.append(served)


class Traffic:
    """All answers of a server."""

    def __init__(self, max_adapters: int = 4096, max_served: int = 4000, wall: Callable[[], float] = time.time) -> None:
        self.wall = wall
        self.num_requests = self.num_tokens = 0
        self.first, self.between = Window(10), Window(10)
        self.by_adapter: dict[str, AdapterTraffic] = {}  # the base's under an empty name
        self.served: deque[Served] = deque(maxlen=max_served)
        self._max_adapters = max_adapters
        self._rolled_at = wall()

    def begin(self, request: NewRequest, arrival: float) -> Flight:
        """Count a request that has arrived."""
        return Flight(self, self.of(request.adapter), request, arrival)

    def of(self, adapter: str | None) -> AdapterTraffic:
        """Return the traffic of an adapter. Above the bound the one that was used longest ago is forgotten."""
        name = adapter or ""
        if name not in self.by_adapter:
            if len(self.by_adapter) >= self._max_adapters:
                idle = [
                    (one.last_used, other) for other, one in self.by_adapter.items() if not one.queued + one.running
                ]
                self.by_adapter.pop(min(idle)[1] if idle else next(iter(self.by_adapter)))
            self.by_adapter[name] = AdapterTraffic()
        return self.by_adapter[name]

    def roll(self) -> None:
        """End a second."""
        self.first.roll()
        self.between.roll()
        now = self.wall()
        if now - self._rolled_at >= _SECONDS_PER_SLOT:
            self._rolled_at = now
            for one in self.by_adapter.values():
                one.roll(now)

    def forget(self, kept: Iterable[str]) -> None:
        """Forget adapters that are gone and have no requests."""
        gone = self.by_adapter.keys() - set(kept) - {""}
        for name in gone:
            if not self.by_adapter[name].queued + self.by_adapter[name].running:
                del self.by_adapter[name]

    def last(self, seconds: float, now: float) -> list[Served]:
        """Return the requests that arrived in the last `seconds` and have been answered, by arrival."""
        found = [each for each in self.served if each.arrival >= now - seconds]
        return sorted(found, key=lambda each: each.arrival)
