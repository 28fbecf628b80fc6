"""The rule of eviction: which adapter leaves the device when another needs its room. The store applies it to real
memory and the simulator to modelled memory; it knows neither, and imports nothing of torch.

An adapter is worth what it costs to bring back, per byte, times the requests that have used it since it came, plus the
worth of the last adapter that was evicted: so an adapter that nobody uses any more falls behind in the end (greedy
dual-size with frequency). The least valuable leaves first; of equals, the least recently used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

GRACE = 256  # wants that an adapter outlasts where it was loaded to before the request it was loaded for must run
_COPY_BYTES_PER_SECOND, _READ_BYTES_PER_SECOND, _FIXED_SECONDS = 2e10, 1e9, 1e-3  # roughly; only their ratios matter


@dataclass(eq=False, kw_only=True)
class Claim:
    """An adapter's claim to its place. Times are on the clock of the Eviction that it is under."""

    references: int = 0  # requests that resolved it and have not released it
    pins: int = 0  # scheduled requests that need it on the device
    popularity: int = 0  # requests since it came to the device
    value: float = 0.0
    last_used: int = 0  # when it was last wanted or pinned
    arrived: int = 0  # when it was given its place on the device
    was_used: bool = False  # pinned since then


AnyClaim = TypeVar("AnyClaim", bound=Claim)


def reload_cost(nbytes: int, on_host: bool) -> float:
    """Estimate the seconds to bring an adapter back to the device, per byte."""
    seconds = _FIXED_SECONDS + nbytes / _COPY_BYTES_PER_SECOND
    if not on_host:
        seconds += _FIXED_SECONDS + nbytes / _READ_BYTES_PER_SECOND
    return seconds / nbytes


def in_order(claims: Iterable[AnyClaim]) -> list[AnyClaim]:
    """Sort claims, the first to leave first."""
    return sorted(claims, key=lambda claim: (claim.value, claim.last_used))


class Eviction:
    """The clock and the aging that all claims on one device share."""

    def __init__(self) -> None:
        self.clock = 0  # counts wants and pins
        self._aging = 0.0  # the value of the last adapter that was evicted

    def touch(self, claim: Claim, cost: float) -> None:
        """Note that an adapter is wanted or used; `cost` is its reload cost now."""
        self.clock += 1
        claim.last_used = self.clock
        claim.value = self._aging + claim.popularity * cost

    def arrive(self, claim: Claim) -> None:
        """Note that an adapter has been given a place on the device."""
        claim.arrived, claim.was_used = self.clock, False

    def may_leave(self, claim: Claim, is_coming: bool) -> bool:
        """Protect what is pinned; and, for a while, what was loaded for a request that has not come to run yet: two
        adapters that are wanted at the same time would else push each other out for ever. `is_coming`: it is still
        being loaded, so that its request could not start.
        """
        if claim.pins:
            return False
        if claim.references and is_coming:
            claim.arrived = self.clock
        return claim.was_used or not claim.references or self.clock - claim.arrived > GRACE

    def evict(self, claim: Claim) -> None:
        """Note that an adapter leaves the device to make room."""
        self._aging = max(self._aging, claim.value)
