"""The store in a storm: any order of loads, uses, replacements, removals, changed files and broken copies."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inlaid.adapters.adapter import Adapter, AdapterEntry, AdapterError
from inlaid.adapters.loader import Arrival, Clock, CopiedByHost, Copy, Loader, StreamLoader, Transfer
from inlaid.adapters.modes import CACHED, MODES, PIPELINED
from inlaid.adapters.store import AdapterStore
from tests.adapters.fake_lane import FakeLane
from tests.adapters.test_store import CPU, SPEC
from tests.examples import examples


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
        needed = slow or mode == PIPELINED
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


Storm.TestCase.settings = examples(150, stateful_step_count=50)
TestStorm = Storm.TestCase
