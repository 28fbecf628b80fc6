"""Histories that are kept while no page is open, so that a page opened late has its graphs. All are bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

KEPT_SECONDS = 900
KEPT_MINUTES = 60
_THRASHING = 4  # loads of one adapter within the minutes looked at, each after an eviction
_LOOKED_AT = 5  # minutes

# One point a second. Rates are per second, shares between 0 and 1, times in seconds.
LOAD = (
    "t",
    "requests",
    "tokens",
    "running",
    "waiting",
    "ttft_p50",
    "ttft_p99",
    "itl_p50",
    "itl_p99",
    "kv_used",
    "kv_cached",
    "preemptions",
    "busy",
    "step",
    "on_device",
)


class LoadHistory:
    """The load of the last minutes, second by second."""

    def __init__(self) -> None:
        self._points: deque[tuple[float | None, ...]] = deque(maxlen=KEPT_SECONDS)

    def add(self, point: Mapping[str, float | None]) -> None:
        """Append a point."""
        self._points.append(tuple(point[name] for name in LOAD))

    def columns(self) -> dict[str, list[float | None]]:
        """Return the points as one list for each name."""
        lists = zip(*self._points) if self._points else ([] for _ in LOAD)
        return {name: list(values) for name, values in zip(LOAD, lists)}


class ResidencyHistory:
    """Adapters on the device minute by minute, and those that come and go too often."""

    def __init__(self) -> None:
        self._minutes: deque[tuple[int, dict[str, int]]] = deque(maxlen=KEPT_MINUTES)
        self._counts: dict[str, tuple[int, int]] = {}  # loads and evictions when last seen

    def note(self, now: float, adapters: Iterable[tuple[str, bool, int, int]]) -> None:
        """Note each adapter's name, whether it is on the device, its loads and its evictions."""
        minute = int(now // 60)
        if not self._minutes or self._minutes[-1][0] != minute:
            self._minutes.append((minute, {}))
        current = self._minutes[-1][1]
        counts: dict[str, tuple[int, int]] = {}
        for name, on_device, loads, evictions in adapters:
            counts[name] = loads, evictions
            before = self._counts.get(name, (loads, evictions))
            grown = max(0, loads - before[0]) if evictions else 0
            if on_device or grown:
                current[name] = current.get(name, 0) + grown
        self._counts = counts

    def minutes(self) -> dict[str, dict[str, int]]:
        """Return, by Unix minute, the adapters that were on the device and how often each was loaded anew in it."""
        return {str(minute): dict(present) for minute, present in self._minutes}  # copies: states are compared

    def thrashing(self) -> dict[str, int]:
        """Return the adapters that were loaded again and again in the last minutes, and how often."""
        sums: dict[str, int] = {}
        newest = self._minutes[-1][0] if self._minutes else 0
        for minute, present in self._minutes:
            if minute > newest - _LOOKED_AT:
                for name, loads in present.items():
                    sums[name] = sums.get(name, 0) + loads
        return {name: loads for name, loads in sums.items() if loads >= _THRASHING}
