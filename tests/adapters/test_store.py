"""The store: names, identities and residence stay whole through any order of loads, uses, replacements and removals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inlaid.adapters.adapter import Adapter, AdapterEntry, AdapterError
from inlaid.adapters.loader import Arrival, Clock, CopiedByHost, Copy, Loader, StreamLoader, Transfer
from inlaid.adapters.modes import CACHED, CPU_ASSIST, MODES, PIPELINED
from inlaid.adapters.store import AdapterStore
from inlaid.adapters.tables import default_pool_elements
from inlaid.model.spec import ModelSpec, spec_from_config
from tests.adapters.fake_lane import FakeLane

SPEC: ModelSpec = spec_from_config(
    {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
)
CPU = torch.device("cpu")


def adapter(number: int, sites: int = 2, size: int = 64) -> Adapter:
    """Content and identity follow from the number; each entry takes 2 * size elements."""
    entries = tuple(
        AdapterEntry(site, 2 * size * site, 2 * size * site + size, 2 * size * (site + 1), number + 1, number + 0.5)
        for site in range(sites)
    )
    return Adapter(f"identity-{number}", "", torch.full((2 * size * sites,), float(number + 1)), entries)


def store(max_resident: int = 3, elements: int = 1024, max_held: int = 100) -> AdapterStore:
    return AdapterStore(SPEC, max_resident, elements, CPU, torch.float32, max_held)


def test_tables_point_at_the_weights() -> None:
    adapters = store()
    identity = adapters.add("a", adapter(3))
    adapters.want(identity)
    assert adapters.ready(identity)
    slot = adapters.slot(identity)
    a_start, b_start, rank = adapters.pages.table[slot, 1].tolist()
    assert (b_start - a_start, rank) == (64, 4)
    assert (adapters.pages.pool[a_start : a_start + 128] == 4.0).all()
    assert adapters.pages.scale[slot].tolist() == [3.5, 3.5] + [0.0] * 12
    assert adapters.slot(None) == 0
    assert not adapters.pages.table[0].any()
    assert adapters.used_bytes == 4 * 256
    assert adapters.capacity_bytes == 4 * 1024


def test_unknown_and_repeated_names_are_errors() -> None:
    adapters = store()
    with pytest.raises(AdapterError, match="'b' is not loaded; loaded: none"):
        adapters.resolve("b")
    adapters.add("a", adapter(1))
    with pytest.raises(AdapterError, match="already loaded"):
        adapters.add("a", adapter(2))
    with pytest.raises(AdapterError, match="'b' is not loaded; loaded: a"):
        adapters.remove("b")


def test_two_names_share_one_identity() -> None:
    adapters = store()
    assert adapters.add("a", adapter(1)) == adapters.add("b", adapter(1))
    adapters.remove("a")
    assert adapters.resolve("b") == "identity-1"
    adapters.check()


def test_replaced_weights_serve_the_requests_they_have() -> None:
    adapters = store()
    adapters.add("a", adapter(1))
    old = adapters.resolve("a")
    adapters.want(old)
    adapters.pin(old)
    new = adapters.replace("a", adapter(2))
    assert adapters.resolve("a") == new != old
    adapters.want(new)
    assert adapters.slot(old) != adapters.slot(new)
    assert adapters.ready(old)
    adapters.unpin(old)
    adapters.release(old)
    with pytest.raises(RuntimeError, match="no longer loaded"):
        adapters.ready(old)
    assert adapters.used_bytes == 4 * 256
    adapters.check()


def test_removed_adapter_goes_with_its_last_request() -> None:
    adapters = store()
    adapters.add("a", adapter(1))
    identity = adapters.resolve("a")
    adapters.want(identity)
    assert adapters.remove("a") == 1
    with pytest.raises(AdapterError, match="not loaded"):
        adapters.resolve("a")
    assert adapters.ready(identity)
    adapters.release(identity)
    assert adapters.used_bytes == 0
    assert adapters.host_bytes == 0
    adapters.check()


def test_least_recently_used_makes_room_and_pinned_stays() -> None:
    adapters = store(max_resident=2)
    one, two, three = (adapters.add(f"a{n}", adapter(n)) for n in range(3))
    adapters.want(one)
    adapters.want(two)
    adapters.pin(one)
    adapters.want(three)
    assert sorted(adapters.resident()) == sorted([one, three])
    adapters.pin(three)
    adapters.want(two)
    assert not adapters.ready(two)
    adapters.unpin(one)
    adapters.want(two)
    assert sorted(adapters.resident()) == sorted([two, three])
    adapters.check()


def test_wanted_together_they_take_turns() -> None:
    """Requests wait for three adapters and one place: the first stays until it has been used."""
    adapters = store(max_resident=1)
    names = [f"a{n}" for n in range(3)]
    for n, name in enumerate(names):
        adapters.add(name, adapter(n))
    identities = [adapters.resolve(name) for name in names]
    for _ in range(5):
        for identity in identities:
            adapters.want(identity)
        assert adapters.resident() == [identities[0]]
    adapters.pin(identities[0])
    adapters.unpin(identities[0])
    adapters.want(identities[1])
    assert adapters.resident() == [identities[1]]


def test_an_adapter_that_never_runs_does_not_block_for_ever() -> None:
    adapters = store(max_resident=1)
    adapters.add("a", adapter(0))
    adapters.add("b", adapter(1))
    first, second = adapters.resolve("a"), adapters.resolve("b")
    adapters.want(first)
    for _ in range(1000):
        adapters.want(second)
    assert adapters.resident() == [second]


def test_a_pinned_adapter_stays_and_one_place_stays_free() -> None:
    adapters = store(max_resident=3)
    kept = adapters.add("kept", adapter(0), keep=True)
    assert adapters.resident() == [kept]
    for n in range(1, 6):
        adapters.want(adapters.add(f"a{n}", adapter(n)))
    assert kept in adapters.resident()
    adapters.replace("a1", adapter(1), keep=True)
    with pytest.raises(AdapterError, match="2 of 3 places are, and one must stay free"):
        adapters.add("third", adapter(9), keep=True)
    with pytest.raises(AdapterError, match="2 of 3 places are"):
        adapters.replace("a2", adapter(2), keep=True)
    adapters.check()
    swapped = adapters.replace("kept", adapter(10))
    assert adapters.kept("kept")
    for n in range(1, 6):
        adapters.want(f"identity-{n}")
    assert {swapped, "identity-1"} <= set(adapters.resident())
    adapters.replace("kept", adapter(10), keep=False)
    adapters.remove("a1")
    for n in range(2, 6):
        adapters.want(f"identity-{n}")
    assert swapped not in adapters.resident()
    adapters.check()


def test_pins_leave_bytes_for_the_largest_of_the_others() -> None:
    adapters = store(max_resident=8, elements=1024)
    adapters.add("large", adapter(1, sites=4))
    adapters.add("a", adapter(2), keep=True)
    with pytest.raises(AdapterError, match="it would leave too few bytes for the others"):
        adapters.add("b", adapter(3, sites=3), keep=True)
    with pytest.raises(AdapterError, match="beside 1024 that are pinned"):
        adapters.add("larger", adapter(4, sites=7))
    assert adapters.names() == ["a", "large"]
    adapters.check()


def test_too_large_and_too_many_are_refused() -> None:
    adapters = store(elements=512, max_held=2)
    with pytest.raises(AdapterError, match=r"needs 4096 bytes of the 2048.*--adapter-memory-gib"):
        adapters.add("large", adapter(1, sites=8))
    adapters.add("a", adapter(1))
    adapters.add("b", adapter(2))
    with pytest.raises(AdapterError, match="--max-cpu-loras"):
        adapters.add("c", adapter(3))
    with pytest.raises(AdapterError, match="--max-cpu-loras"):
        adapters.add("second name", adapter(1))
    assert adapters.names() == ["a", "b"]
    adapters.replace("b", adapter(1))
    assert adapters.identity("b") == adapters.identity("a")


def test_weights_survive_a_fragmented_pool() -> None:
    adapters = store(max_resident=8, elements=1024)
    small = [adapters.add(f"s{n}", adapter(n, sites=1)) for n in range(8)]
    for identity in small:
        adapters.want(identity)
    for n in (1, 3, 5, 7):
        adapters.remove(f"s{n}")
    scattered = adapters.add("wide", adapter(9, sites=3))
    adapters.want(scattered)
    slot = adapters.slot(scattered)
    starts = adapters.pages.table[slot, :3, 0].tolist()
    assert starts[1] - starts[0] != 128
    for start in starts:
        assert (adapters.pages.pool[start : start + 128] == 10.0).all()
    adapters.check()


def test_default_room_holds_that_many_of_rank_16() -> None:
    per_adapter = 16 * sum(sum(SPEC.module_shape(m)) for m in ("q_proj", "k_proj", "v_proj", "o_proj")) * 2
    assert default_pool_elements(SPEC, 5) > 5 * per_adapter


class ByHand(Loader):
    """Copies when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: list[Transfer] = []

    def start(self, groups: list[list[Copy]], clock: Clock) -> Arrival:
        self.transfers.append(Transfer(groups, CopiedByHost(len(groups), clock)))
        return self.transfers[-1].arrival

    def step(self, breaks: bool) -> None:
        """Copy the next layer group of the first transfer that is still wanted."""
        gone = lambda arrival: arrival.cancelled or arrival.whole or arrival.error is not None  # noqa: E731
        self.transfers = [transfer for transfer in self.transfers if not gone(transfer.arrival)]
        if self.transfers and breaks:
            self.transfers[0].arrival.fail("the bus is gone")
        elif self.transfers:
            self.transfers[0].copy_next()
            self.transfers[0].arrival.land()


class Storm(RuleBasedStateMachine):
    """Any order of what the engine and the server may do, of files changing, and of copies that come late or never."""

    @initialize(mode=st.sampled_from(MODES), host=st.sampled_from([0, 2000]), slow=st.booleans(), streams=st.booleans())
    def begin(self, mode: str, host: int, slow: bool, streams: bool) -> None:
        self.disk: dict[str, Adapter] = {}
        needed = slow or mode in (PIPELINED, CPU_ASSIST)
        self.lane = FakeLane() if needed and streams else None
        self.loader = StreamLoader(self.lane) if self.lane else ByHand() if needed else None
        self.store = AdapterStore(
            SPEC, 2, 900, CPU, torch.float32, mode=mode, loader=self.loader, host_budget=host, read=self.read
        )
        self.waiting: list[str] = []
        self.pinned: list[str] = []

    def read(self, path: str) -> Adapter:
        if path not in self.disk:
            raise AdapterError(f"adapter {path}: there is no such folder")
        return self.disk[path]

    def made(self, number: int, sites: int) -> Adapter:
        """At path "number", acting in both layers when it has three sites; 128 elements each."""
        entries = tuple(
            AdapterEntry(4 * n, 128 * n, 128 * n + 64, 128 * (n + 1), number + 1, number + 0.5) for n in range(sites)
        )
        flat = torch.full((128 * sites,), float(10 * number + sites))
        return Adapter(f"{10 * number + sites}", f"/{number}", flat, entries)

    @rule(
        name=st.sampled_from("abc"),
        number=st.integers(0, 3),
        sites=st.integers(1, 3),
        keep=st.sampled_from([None, None, False, True]),
    )
    def load(self, name: str, number: int, sites: int, keep: bool | None) -> None:
        new = self.made(number, sites)
        self.disk[new.path] = new
        refusal = ""
        try:
            self.store.replace(name, new, keep)
        except AdapterError as error:
            refusal = str(error)
        assert not refusal or "cannot be pinned" in refusal or (self.store.mode == CACHED and "does not fit" in refusal)
        kept = {self.store.identity(name) for name in self.store.names() if self.store.kept(name)}
        assert len(kept) < 2 or self.store.mode == CACHED

    @rule(number=st.integers(0, 3), sites=st.integers(0, 3))
    def change_files(self, number: int, sites: int) -> None:
        if sites:
            self.disk[f"/{number}"] = self.made(number, sites)
        else:
            self.disk.pop(f"/{number}", None)

    @precondition(lambda self: self.store.names())
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        self.store.remove(data.draw(st.sampled_from(self.store.names())))

    @precondition(lambda self: self.store.names())
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        self.waiting.append(self.store.resolve(data.draw(st.sampled_from(self.store.names()))))

    @precondition(lambda self: self.waiting)
    @rule(read=st.booleans(), groups=st.integers(0, 3), breaks=st.sampled_from([False] * 7 + [True]))
    def turn(self, read: bool, groups: int, breaks: bool) -> None:
        """Want what is waited for, and let reads and copies get on."""
        for _ in range(1 + read):
            for identity in self.waiting:
                self.store.want(identity)
            self.store.check()
            for held in self.store._registry.held.values():
                if read and held.reading is not None:
                    held.reading.exception()
        for _ in range(groups):
            if self.lane is not None:
                self.lane.advance()
            elif self.loader is not None:
                self.loader.step(breaks)

    @precondition(lambda self: self.waiting)
    @rule()
    def run_the_ready(self) -> None:
        for identity in list(self.waiting):
            reason, ready = "", False
            try:
                ready = self.store.ready(identity)
            except RuntimeError as error:
                reason = str(error)
            if reason:
                assert any(known in reason for known in ("there is no such folder", "has changed", "the bus is gone"))
                self.waiting.remove(identity)
                self.store.release(identity)
            elif ready:
                self.store.pin(identity)
                self.pinned.append(identity)
                self.waiting.remove(identity)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        identity = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(identity)
        self.store.release(identity)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        identity = data.draw(st.sampled_from(self.pinned))
        self.pinned.remove(identity)
        self.store.unpin(identity)
        self.store.release(identity)

    @invariant()
    def whole(self) -> None:
        store = self.store
        store.check()
        for identity in self.pinned:
            slot, value = store.slot(identity), float(identity)
            for site in store.sites(identity):
                if store.landed(slot, site // 7):
                    start = int(store.pages.table[slot, site, 0])
                    assert store.pages.table[slot, site, 2] > 0
                    assert (store.pages.pool[start : start + 128] == value).all(), "a pinned adapter was overwritten"
                elif store.mode == CPU_ASSIST:
                    assert store.pages.table[slot, site, 2] == 0, "shown before it has landed"
                    factors = store.host_factors(slot, site)
                    assert factors is not None
                    assert (factors.a_RK == value).all()
                    assert (factors.b_NR == value).all()

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        for identity in self.pinned:
            self.store.unpin(identity)
        for identity in self.pinned + self.waiting:
            self.store.release(identity)
        for name in self.store.names():
            self.store.remove(name)
        self.store.check()
        assert (self.store.used_bytes, self.store.host_bytes) == (0, 0)


Storm.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestStorm = Storm.TestCase
