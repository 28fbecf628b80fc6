"""The allocator of the flat adapter pool. An adapter takes exactly what its ranks need, rounded up to the
alignment of its matrices; extents are kept sorted and merged when freed. The store calls it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Protocol


class Lender(Protocol):
    """The KV cache, as the store sees it where the two share memory."""

    def lend(self, count: int, idle: bool) -> list[int]:
        """Lend `count` blocks that nobody uses, or none; with `idle` also such that are cached for later."""
        ...


class PagePool:
    """First fit over free extents [start, end). All sizes are in elements."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free: list[tuple[int, int]] = [(0, size)] if size else []
        self.used = 0

    def grant(self, start: int, size: int) -> None:
        """Add space to the pool."""
        self.size += size
        self.used += size
        self.give(start, size)

    def withdraw(self, unit: int, begin: int, most: int) -> list[int]:
        """Take up to `most` wholly free units of space from `begin` on out of the pool; returns their numbers."""
        found = [
            number
            for start, end in self.free
            for number in range(max(-(-start // unit), begin // unit), end // unit)
        ][:most]  # fmt: skip
        for number in found:
            index = next(i for i, (start, end) in enumerate(self.free) if start <= number * unit < end)
            start, end = self.free.pop(index)
            kept = [(start, number * unit), ((number + 1) * unit, end)]
            self.free[index:index] = [extent for extent in kept if extent[0] < extent[1]]
            self.size -= unit
        return found

    def take(self, sizes: Sequence[int]) -> list[int] | None:
        """Return the start of an extent for each size, adjacent if possible; None, taking none, if they do not fit."""
        whole = self._take_one(sum(sizes))
        if whole is not None:
            return [whole + sum(sizes[:index]) for index in range(len(sizes))]
        starts: list[int] = []
        for size in sizes:
            start = self._take_one(size)
            if start is None:
                for taken, taken_size in zip(starts, sizes, strict=False):
                    self.give(taken, taken_size)
                return None
            starts.append(start)
        return starts

    def give(self, start: int, size: int) -> None:
        """Free an extent, merging it with its neighbours."""
        end = start + size
        index = bisect_left(self.free, (start, end))
        assert index == len(self.free) or end <= self.free[index][0], "freed twice"
        assert index == 0 or self.free[index - 1][1] <= start, "freed twice"
        self.used -= size
        if index < len(self.free) and self.free[index][0] == end:
            end = self.free.pop(index)[1]
        if index and self.free[index - 1][1] == start:
            start = self.free.pop(index - 1)[0]
        insort(self.free, (start, end))

    def _take_one(self, size: int) -> int | None:
        for index, (start, end) in enumerate(self.free):
            if end - start >= size:
                self.free[index : index + 1] = [(start + size, end)] if end - start > size else []
                self.used += size
                return start
        return None

    def check(self) -> None:
        """Assert that free extents are sorted and apart, and with the used elements make the pool whole."""
        previous = -1
        for start, end in self.free:
            assert previous < start < end, f"extent {start, end} after {previous}"
            previous = end
        assert self.used + sum(end - start for start, end in self.free) == self.size
