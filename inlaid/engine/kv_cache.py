"""The pool of KV blocks: reference counts, the free list, and the prefix cache's names for full blocks.

The scheduler is the only caller. Blocks are numbers here; their tensors live in the model runner. Block 0 is the
scratch block (padding rows write there) and is never given out.

A block is in exactly one of three places: referenced (by one request or more), idle (nobody uses it, but it still
holds a named prefix and waits, least recently used first, to be reused or overwritten), or free. Where adapters share
the memory (runner/unified.py) there is a fourth: lent to them, until it is asked back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import groupby
from struct import pack
from typing import Protocol


class Borrower(Protocol):
    """The adapter store, which blocks are lent to."""

    def give_back(self, count: int, keep: str | None) -> list[int]:
        """Give back up to `count` blocks by evicting idle adapters, but not the one with the identity `keep`."""
        ...


SCRATCH = 0  # the block of padding rows

Key = bytes  # 128 bits: two different prefixes never meet in practice, so content is not compared again


@lru_cache(maxsize=4096)
def root_key(base_version: str, adapter: str | None, tenant: str = "", salt: str = "") -> Key:
    """Return the start of a chain: KV depends on the base weights and on the adapter; a tenant's name and a salt keep
    apart what they are given for."""
    named = (base_version, "base" if adapter is None else "adapter:" + adapter, tenant, salt)
    text = "".join(f"{len(part)}:{part}" for part in named)
    return blake2b(text.encode(), digest_size=16).digest()


def extend_keys(keys: list[Key], root: Key, tokens: Sequence[int], block_size: int) -> None:
    """Append to keys until it names every full block of tokens, each by its tokens and everything before them."""
    parent = keys[-1] if keys else root
    fresh = tokens[len(keys) * block_size : len(tokens) // block_size * block_size]
    text, width = pack(f"{len(fresh)}i", *fresh), 4 * block_size  # so that 16 tokens and a parent are one round
    for start in range(0, len(text), width):
        parent = blake2b(parent + text[start : start + width], digest_size=16).digest()
        keys.append(parent)


class BlockPool:
    """Owner of every block's reference count and name."""

    def __init__(
        self, num_blocks: int, block_size: int, first: int = 1, floor: int = 0, borrower: Borrower | None = None
    ) -> None:
        """Own the blocks from `first` on; the last `floor` of them are never lent."""
        if num_blocks < first + 1:
            raise ValueError(f"num_blocks is {num_blocks}; at least {first + 1} are needed, as block 0 is scratch")
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; it must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._key_of: list[Key | None] = [None] * num_blocks
        self._block_of: dict[Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._free = list(range(num_blocks - 1, first - 1, -1))
        self._first = first
        self._last_lent = num_blocks - 1 - floor
        self._borrower = borrower
        self._lent: set[int] = set()
        if borrower is not None:
            self._free.reverse()  # its own before those that may be lent

    @property
    def capacity(self) -> int:
        """Blocks that requests may hold together."""
        return self.num_blocks - self._first - len(self._lent)

    @property
    def guaranteed(self) -> int:
        """Blocks that requests can hold together whatever is lent."""
        return self.capacity if self._borrower is None else self.num_blocks - 1 - self._last_lent

    @property
    def num_lent(self) -> int:
        return len(self._lent)

    @property
    def num_available(self) -> int:
        """Blocks that allocate can give out now; idle blocks count, as their content may be dropped."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        return len(self._block_of)

    def allocate(self, count: int) -> list[int]:
        """Take new blocks, each with one reference. The caller has looked at num_available."""
        assert count <= self.num_available, f"{count} blocks wanted, {self.num_available} available"
        return [self.take() for _ in range(count)]

    def take(self) -> int:
        """Take one new block."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        """Remove the name of a block that has one."""
        key = self._key_of[block]
        assert key is not None
        del self._block_of[key]
        self._key_of[block] = None

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these named or referenced blocks."""
        for block in blocks:
            if self._references[block] == 0:
                del self._idle[block]
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each. The last blocks of a chain are the first to be overwritten later."""
        references, key_of = self._references, self._key_of
        for block in reversed(blocks):
            left = references[block] - 1
            assert left >= 0, f"block {block} freed twice"
            references[block] = left
            if not left:
                if key_of[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def publish(self, blocks: Iterable[int], keys: Iterable[Key]) -> None:
        """Name full blocks whose KV is written. If another block already has such a name, that one keeps it."""
        key_of, block_of = self._key_of, self._block_of
        for block, key in zip(blocks, keys):
            assert self._references[block] > 0, f"block {block} is named, but no request holds it"
            if key_of[block] is None and key not in block_of:
                key_of[block] = key
                block_of[key] = block

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Drop the names of blocks that requests hold; their KV is not to be shared any more."""
        for block in blocks:
            if self._key_of[block] is not None:
                self._forget(block)

    def match(self, keys: Sequence[Key]) -> list[int]:
        """Return the blocks of the longest known prefix of keys; not referenced yet, see share."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """Count the blocks that no request holds: sharing these uses up availability."""
        return sum(self._references[block] == 0 for block in blocks)

    # Memory shared with adapters.

    def lend(self, count: int, idle: bool) -> list[int]:
        """Lend `count` unused blocks, side by side if possible, or none; with `idle`, cached prefixes are dropped for
        it. A sixteenth of all blocks stays available."""
        if self.num_available - count < (self.num_blocks - self._first) // 16:
            return []
        free = sorted(block for block in self._free if block <= self._last_lent)
        chosen = _side_by_side(free, count)
        if len(chosen) < count and idle:
            cached = [block for block in self._idle if block <= self._last_lent]  # least recently used first
            chosen += cached[: count - len(chosen)]
        if len(chosen) < count:
            return []
        taken = set(chosen)
        for block in taken.intersection(self._idle):
            del self._idle[block]
            self._forget(block)
        self._free = [block for block in self._free if block not in taken]
        self._lent |= taken
        return sorted(taken)

    def want(self, available: int, capacity: int, keep: str | None) -> bool:
        """Ask lent blocks back until `available` are available and `capacity` may be held, as far as they come; not at
        the cost of the adapter with the identity `keep`. Return True if enough are available now."""
        missing = max(available - self.num_available, capacity - self.capacity)
        if missing > 0 and self._lent and self._borrower is not None:
            for block in self._borrower.give_back(missing, keep):
                self._lent.remove(block)
                self._free.append(block)
        return self.num_available >= available

    def clear(self) -> None:
        """Drop every name; referenced blocks stay with their requests."""
        for block in list(self._block_of.values()):
            self._forget(block)
        self._free.extend(self._idle)
        self._idle.clear()

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the pool is whole and exactly these lists hold references."""
        counts = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                counts[block] += 1
        assert counts == self._references, "reference counts differ from what requests hold"
        given = (counts[0], 0 in self._free, 0 in self._idle)
        assert given == (0, False, False), "the scratch block was given out"
        used = {block for block, count in enumerate(counts) if count}
        places = sorted([*self._free, *self._idle, *used, *self._lent])
        assert places == list(range(self._first, self.num_blocks)), "a block is lost or in two places"
        assert all(block <= self._last_lent for block in self._lent), "a block of the floor was lent"
        assert all(self._key_of[block] is None for block in self._free), "a free block has a name"
        assert all(self._key_of[block] is not None for block in self._idle), "an idle block has no name"
        named = {block: key for block, key in enumerate(self._key_of) if key is not None}
        assert named == {block: key for key, block in self._block_of.items()}, "names and blocks disagree"


def _side_by_side(blocks: Sequence[int], count: int) -> list[int]:
    """Choose `count` of these sorted blocks, from the longest runs."""
    runs = [[block for _, block in run] for _, run in groupby(enumerate(blocks), lambda pair: pair[1] - pair[0])]
    ordered = [block for run in sorted(runs, key=len, reverse=True) for block in run]
    return ordered[:count]
