"""The pool's allocator: whole after anything, exact, all or nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.adapters.pages import PagePool
from tests.examples import examples


@given(st.lists(st.one_of(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 30)), max_size=60))
@examples(200)
def test_whole_after_any_takes_and_gives(actions: list[list[int] | int]) -> None:
    pool = PagePool(200)
    held: list[tuple[list[int], list[int]]] = []
    for action in actions:
        if isinstance(action, list):
            before = list(pool.free)
            starts = pool.take(action)
            if starts is None:
                assert pool.free == before
            else:
                held.append((starts, action))
        elif held:
            for start, size in zip(*held.pop(action % len(held)), strict=True):
                pool.give(start, size)
        pool.check()
        taken = sorted((start, start + size) for pair in held for start, size in zip(*pair, strict=True))
        assert all(a[1] <= b[0] for a, b in pairwise(taken))
        assert pool.used == sum(end - start for start, end in taken)
    for starts, sizes in held:
        for start, size in zip(starts, sizes, strict=True):
            pool.give(start, size)
    assert pool.free == [(0, 200)]


def test_adjacent_when_possible_and_split_when_not() -> None:
    pool = PagePool(30)
    first, second, third = (pool.take([10]) for _ in range(3))
    assert (first, second, third) == ([0], [10], [20])
    pool.give(0, 10)
    pool.give(20, 10)
    assert pool.take([6, 4]) == [0, 6]
    pool.give(0, 10)
    assert pool.take([8, 8]) == [0, 20]
    assert pool.take([5]) is None


def test_giving_twice_is_caught() -> None:
    pool = PagePool(10)
    pool.take([4])
    pool.give(0, 4)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.give(0, 4)
