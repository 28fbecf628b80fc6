"""KV blocks and adapters in one memory: whatever either side does, nobody's content is touched, both floors hold, and
each gets back what the other only keeps for later."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inlaid.adapters.adapter import Adapter, AdapterEntry
from inlaid.adapters.loader import StreamLoader
from inlaid.adapters.modes import ON_DEMAND, PIPELINED
from inlaid.adapters.store import AdapterStore
from inlaid.engine.kv_cache import BlockPool
from tests.adapters.fake_lane import FakeLane
from tests.adapters.test_store import CPU, SPEC
from tests.examples import examples

UNIT = 128  # elements in a block
FIRST, BLOCKS, FLOOR = 3, 24, 5  # two blocks are the adapters', the last five are KV's


def adapter(number: int, sites: int) -> Adapter:
    entries = tuple(
        AdapterEntry(4 * n, 64 * n, 64 * n + 32, 64 * (n + 1), number + 1, number + 0.5) for n in range(sites)
    )
    return Adapter(str(number), "", torch.full((64 * sites,), float(number)), entries)


class Sharing(RuleBasedStateMachine):
    """Requests that hold KV blocks and write them, cached prefixes, adapters that come, are used and go."""

    @initialize(mode=st.sampled_from([ON_DEMAND, PIPELINED]))
    def begin(self, mode: str) -> None:
        self.lane = FakeLane()
        self.store = AdapterStore(
            SPEC, 6, 2 * UNIT, CPU, torch.float32, mode=mode, loader=StreamLoader(self.lane), shared=True
        )
        self.memory = torch.zeros(BLOCKS * UNIT)
        self.pool = BlockPool(BLOCKS, 4, first=FIRST, floor=FLOOR, borrower=self.store)
        self.store.move_into(self.memory, UNIT, FIRST, self.pool)
        self.held: list[list[int]] = []
        self.pinned: list[str] = []
        self.num_keys = 0

    def block(self, number: int) -> torch.Tensor:
        return self.memory[number * UNIT : (number + 1) * UNIT]

    @rule(count=st.integers(1, 8), pinned=st.booleans())
    def take_blocks(self, count: int, pinned: bool) -> None:
        """All blocks but the adapters' floor can be had while nothing runs on adapters."""
        keep = self.pinned[0] if self.pinned and pinned else None
        self.pool.want(count, 0, keep)
        if not self.pinned:
            assert self.pool.num_available >= min(count, BLOCKS - FIRST - sum(map(len, self.held)))
        if count <= self.pool.num_available:
            blocks = self.pool.allocate(count)
            for number in blocks:
                self.block(number).fill_(-float(number))  # as the device's computing does, at once
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), named=st.booleans())
    def end_request(self, data: st.DataObject, named: bool) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        for number in blocks if named else ():
            self.num_keys += 1
            self.pool.publish([number], [str(self.num_keys).encode()])
        self.pool.free(blocks)

    @rule(number=st.integers(1, 9), sites=st.integers(1, 4))
    def load(self, number: int, sites: int) -> None:
        if self.store.identity(f"a{number}") is None:
            self.store.add(f"a{number}", adapter(number, sites))
        self.store.want(str(number))

    @rule(steps=st.integers(1, 6))
    def copies_land(self, steps: int) -> None:
        for _ in range(steps):
            self.lane.advance()

    @rule()
    def run_the_ready(self) -> None:
        for identity in self.store.resident():
            if identity not in self.pinned and self.store.ready(identity):
                self.store.pin(identity)
                self.pinned.append(identity)
                break

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def end_run(self, data: st.DataObject) -> None:
        self.store.unpin(self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1))))

    @precondition(lambda self: self.store.names())
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        self.store.remove(data.draw(st.sampled_from(self.store.names())))

    @invariant()
    def whole(self) -> None:
        pool, store = self.pool, self.store
        pool.check(self.held)
        store.check()
        assert store.space.size == store.floor + pool.num_lent * UNIT
        assert pool.capacity >= FLOOR == pool.guaranteed
        for blocks in self.held:
            for number in blocks:
                assert (self.block(number) == -float(number)).all(), "KV was overwritten"
        for identity in self.pinned:
            slot = store.slot(identity)
            for site in store.sites(identity):
                if store.landed(slot, site // 7):
                    start = int(store.pages.table[slot, site, 0])
                    assert (self.memory[start : start + 64] == float(identity)).all(), "an adapter was overwritten"

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        for identity in self.pinned:
            self.store.unpin(identity)
        for blocks in self.held:
            self.pool.free(blocks)
        for name in self.store.names():
            self.store.remove(name)
        self.pool.want(BLOCKS - FIRST, 0, None)
        assert (self.store.used_bytes, self.pool.num_lent) == (0, 0)
        assert self.pool.num_available == BLOCKS - FIRST
        self.pool.check([])
        self.store.check()


Sharing.TestCase.settings = examples(150, stateful_step_count=50)
TestSharing = Sharing.TestCase


def make(kv_blocks: int = BLOCKS) -> tuple[AdapterStore, BlockPool]:
    store = AdapterStore(SPEC, 6, 2 * UNIT, CPU, torch.float32, shared=True)
    pool = BlockPool(kv_blocks, 4, first=FIRST, floor=FLOOR, borrower=store)
    store.move_into(torch.zeros(kv_blocks * UNIT), UNIT, FIRST, pool)
    return store, pool


def test_adapters_borrow_what_nobody_uses_and_keep_off_kvs_floor() -> None:
    store, pool = make()
    for number in range(1, 7):
        store.want(store.add(f"a{number}", adapter(number, 4)))  # two blocks each
    assert len(store.resident()) == 6
    assert (pool.num_lent, store.counts("1").evictions) == (10, 0)
    held = pool.allocate(pool.num_available)
    assert len(held) == BLOCKS - FIRST - 10
    pool.want(4, 0, "6")
    assert pool.num_available == 4
    assert len(store.resident()) == 4
    assert "6" in store.resident()
    store.check()
    pool.check([held])


def test_what_runs_is_not_taken_and_the_floor_is_enough_for_it() -> None:
    store, pool = make(FIRST + FLOOR + 4)
    first, second = (store.add(f"a{number}", adapter(number, 4)) for number in (1, 2))
    for identity in (first, second):
        store.want(identity)
        store.pin(identity)
    assert pool.num_lent == 2
    pool.want(pool.capacity + 1, 0, None)
    assert (pool.num_lent, pool.num_available) == (2, FLOOR + 2)
    store.unpin(second)
    pool.want(FLOOR + 4, 0, None)
    assert (pool.num_lent, store.resident()) == (0, [first])


def test_cached_prefixes_go_after_idle_adapters() -> None:
    """A prefix may be of more use than an adapter that nobody runs; it goes when there is no such adapter."""
    store, pool = make()
    blocks = pool.allocate(BLOCKS - FIRST - 1)
    for number in blocks:
        pool.publish([number], [str(number).encode()])
    pool.free(blocks)
    one, two = (store.add(f"a{number}", adapter(number, 4)) for number in (1, 2))
    store.want(one)
    store.want(two)
    assert store.resident() == [two]
    assert pool.num_cached == len(blocks)
    store.pin(two)
    store.want(one)
    assert sorted(store.resident()) == [one, two]
    assert pool.num_cached < len(blocks)
    pool.check([])
