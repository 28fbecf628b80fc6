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


class Steps:
    """Number the steps, time them, and defer releases until no step in flight can use what is released."""

    def __init__(self, pool: BlockPool, adapters: AdapterDirectory) -> None:
        self._pool = pool
        self._adapters = adapters
        self._last = 0
        self._in_flight: deque[tuple[int, float]] = deque()  # number, and when it was made
        self._ended_at = 0.0
        self.busy_seconds = (
            0.0  # of the step that ended last, and of the host before it if that kept the device waiting
        )
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
        self._in_flight.append((self._last, now))
        return self._last

    def end(self, step: int, now: float) -> float:
        """Take a step as over, release what only it could use, and return the seconds that it took."""
        made = next(when for number, when in self._in_flight if number == step)
        self._in_flight.remove((step, made))
        seconds = now - max(made, self._ended_at)
        self.busy_seconds = now - (self._ended_at if made - self._ended_at < MAX_GAP else made)
        self._ended_at = now
        oldest = self._in_flight[0][0] if self._in_flight else self._last + 1
        over = [held for held in self._deferred if held.step < oldest]
        self._deferred = [held for held in self._deferred if held.step >= oldest]
        for held in over:
            self._release(held.blocks, held.adapter)
        return seconds

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
