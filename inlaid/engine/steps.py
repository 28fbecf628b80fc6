"""The steps in flight, and the memory that is freed only when they are over.

A step that was submitted may still write to the blocks of a request that has ended meanwhile, and use its adapter.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from inlaid.engine.kv_cache import BlockPool
from inlaid.engine.residency import AdapterDirectory

MAX_GAP = 0.01  # seconds between two steps; after longer ones the engine was idle


@dataclass(frozen=True)
class _Deferred:
    """Blocks and the adapter of a request that left, kept until every step up to `step` is over."""

    step: int
    blocks: list[int]
    adapter: str | None


@dataclass
class _Flight:
    """A step in flight: its number, and when the host was free for it, made it and had submitted it."""

    step: int
    since: float
    made: float
    submitted: float


@dataclass(frozen=True)
class Timing:
    """The seconds of a step that is over."""

    seconds: float  # from the end of the step before, or from when it was made
    busy: float  # the same with the host's work before it, if that kept the device waiting
    host: float  # of the host, to make and submit it
    waited: float | None  # by the host, for its end; None: the host made no other step meanwhile
    overlapped: bool  # it was made while the device computed the step before


class Steps:
    """Number the steps, time them, and defer releases until no step in flight can use what is released."""

    def __init__(self, pool: BlockPool, adapters: AdapterDirectory) -> None:
        self._pool = pool
        self._adapters = adapters
        self._last = 0
        self._in_flight: deque[_Flight] = deque()
        self._ended_at = 0.0
        self._has_rested = True  # nothing was left to do when the last step ended
        self._deferred: list[_Deferred] = []

    @property
    def num_deferred_blocks(self) -> int:
        """Blocks that come free when the steps in flight are over."""
        return sum(len(held.blocks) for held in self._deferred)

    @property
    def deferred_blocks(self) -> list[list[int]]:
        return [held.blocks for held in self._deferred]

    def begin(self, now: float) -> int:
        """Start a new step and return its number."""
        self._last += 1
        since = now if self._has_rested or now - self._ended_at >= MAX_GAP else self._ended_at
        self._has_rested = False
        self._in_flight.append(_Flight(self._last, since, now, now))
        return self._last

    def submitted(self, step: int, now: float) -> float:
        """Note that the device has been given all of a step; return the host's seconds for it."""
        flight = next(each for each in self._in_flight if each.step == step)
        flight.submitted = now
        return now - flight.since

    def end(self, step: int, now: float) -> Timing:
        """Take a step as over, release what only it could use, and return its times."""
        flight = next(each for each in self._in_flight if each.step == step)
        self._in_flight.remove(flight)
        waited = now - self._in_flight[-1].submitted if self._in_flight else None
        seconds, busy = now - max(flight.made, self._ended_at), now - max(flight.since, self._ended_at)
        timing = Timing(seconds, busy, flight.submitted - flight.since, waited, flight.made < self._ended_at)
        self._ended_at = now
        oldest = self._in_flight[0].step if self._in_flight else self._last + 1
        over = [held for held in self._deferred if held.step < oldest]
        self._deferred = [held for held in self._deferred if held.step >= oldest]
        for held in over:
            self._release(held.blocks, held.adapter)
        return timing

    def rest(self) -> None:
        """Note that nothing is left to do: the seconds until the next step are nobody's."""
        self._has_rested = True

    def release(self, blocks: list[int], adapter: str | None) -> None:
        """Free the blocks and unpin the adapter of a request that left, as soon as no step in flight uses them."""
        if self._in_flight:
            self._deferred.append(_Deferred(self._last, blocks, adapter))
        else:
            self._release(blocks, adapter)

    def _release(self, blocks: list[int], adapter: str | None) -> None:
        self._pool.free(blocks)
        if adapter is not None:
            self._adapters.unpin(adapter)
