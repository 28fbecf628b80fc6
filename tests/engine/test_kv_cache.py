"""The block pool: nothing lost, nothing twice, and a name only ever for one content."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inlaid.engine.kv_cache import BlockPool, extend_keys, root_key
from tests.examples import examples


def name_of(root: bytes, tokens: list[int]) -> bytes:
    """Return the name of the last of these blocks of two."""
    keys: list[bytes] = []
    extend_keys(keys, root, tokens, 2)
    return keys[-1]


def test_block_zero_is_never_given_out() -> None:
    pool = BlockPool(5, 4)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_available == 0
    with pytest.raises(AssertionError, match="wanted"):
        pool.allocate(1)


def test_a_block_freed_twice_is_noticed() -> None:
    pool = BlockPool(5, 4)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.free(blocks)


def test_named_blocks_outlive_their_request_until_room_is_needed() -> None:
    pool = BlockPool(4, 2)
    keys: list[bytes] = []
    extend_keys(keys, root_key("v1", None), [1, 2, 3, 4], 2)
    blocks = pool.allocate(2)
    pool.publish(blocks, keys)
    pool.free(blocks)
    assert pool.match(keys) == blocks
    assert pool.num_available == 3
    taken = pool.allocate(2)  # the free one, then the end of the chain: its head stays useful
    assert pool.match(keys) == blocks[:1]
    pool.free(taken)
    pool.check([])


def test_names_made_in_one_go_and_one_by_one_are_the_same() -> None:
    at_once: list[bytes] = []
    grown: list[bytes] = []
    tokens = list(range(11))
    extend_keys(at_once, b"root", tokens, 3)
    for length in range(12):
        extend_keys(grown, b"root", tokens[:length], 3)
    assert at_once == grown
    assert len(set(at_once)) == 3


def test_the_first_name_wins_and_the_second_block_stays_unnamed() -> None:
    pool = BlockPool(4, 2)
    first, second = pool.allocate(2)
    pool.publish([first], [b"k" * 16])
    pool.publish([second], [b"k" * 16])
    assert pool.match([b"k" * 16]) == [first]
    pool.free([second])
    pool.check([[first]])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (root_key("v1", "a"), root_key("v2", "a")),
        (root_key("v1", "a"), root_key("v1", "b")),
        (root_key("v1", None), root_key("v1", "base")),
        (root_key("v1", None, "x"), root_key("v1", None)),
        (root_key("v1", None, "", "x"), root_key("v1", None)),
        (root_key("v1", None, "", "x"), root_key("v1", None, "x")),
        (root_key("v1", None, "x", ""), root_key("v1", None, "", "x")),
        (root_key("v1", "ab"), root_key("v1a", "b")),
        (name_of(b"p", [1, 2]), name_of(b"q", [1, 2])),
        (name_of(b"p", [1, 2]), name_of(b"p", [2, 1])),
        (name_of(b"p", [1, 256]), name_of(b"p", [257, 0])),
        (name_of(b"p", [1, 2, 3, 4]), name_of(b"p", [5, 6, 3, 4])),
    ],
)
def test_names_differ_when_anything_differs(one: bytes, other: bytes) -> None:
    assert one != other


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="scratch"):
        BlockPool(1, 4)
    with pytest.raises(ValueError, match="block_size"):
        BlockPool(5, 0)


class Storm(RuleBasedStateMachine):
    """Admit, extend, fork, free and forget in any order; the pool is whole after each."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 2)
        self.held: list[tuple[list[int], list[bytes]]] = []

    @rule(tokens=st.lists(st.integers(0, 1), max_size=10))
    def admit(self, tokens: list[int]) -> None:
        keys: list[bytes] = []
        extend_keys(keys, root_key("v", None), tokens, 2)
        hits = self.pool.match(keys)
        need = (len(tokens) + 1) // 2 - len(hits)
        if need > self.pool.num_available - self.pool.num_idle(hits):
            return
        self.pool.share(hits)
        blocks = hits + self.pool.allocate(need)
        self.pool.publish(blocks, keys)
        self.held.append((blocks, keys))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        if self.pool.num_available:
            data.draw(st.sampled_from(self.held))[0].extend(self.pool.allocate(1))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        blocks, keys = data.draw(st.sampled_from(self.held))
        self.pool.share(blocks)
        self.held.append((list(blocks), keys))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(blocks)

    @rule()
    def clear(self) -> None:
        self.pool.clear()

    @invariant()
    def whole(self) -> None:
        self.pool.check(blocks for blocks, _ in self.held)
        assert self.pool.num_available == 11 - len({b for blocks, _ in self.held for b in blocks})


TestStorm = Storm.TestCase
TestStorm.settings = examples(60, stateful_step_count=40)
