"""Host memory within its budget: what does not fit is read again when wanted, or refused with the reason; and what the
loader promises to those who wait."""

from __future__ import annotations

import time

import pytest
import torch

from inlaid.adapters.adapter import Adapter, AdapterEntry, AdapterError
from inlaid.adapters.loader import Arrival, Clock, CopiedByHost, Copy, Loader
from inlaid.adapters.modes import ON_DEMAND, PIPELINED
from inlaid.adapters.store import AdapterStore
from inlaid.model.spec import spec_from_config

SPEC = spec_from_config(
    {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
)


def adapter(name: str, value: float) -> Adapter:
    """512 bytes in layer 0 and as many in layer 1."""
    entries = (AdapterEntry(0, 0, 64, 128, 4, 1.0), AdapterEntry(7, 128, 192, 256, 4, 1.0))
    return Adapter(f"{name}-{value}", name, torch.full((256,), value), entries)


class Never(Loader):
    """Its copies do not get anywhere."""

    def start(self, groups: list[list[Copy]], clock: Clock) -> Arrival:
        self.arrival = CopiedByHost(len(groups), clock)
        return self.arrival


class Disk:
    """The adapters that reading a path gives now."""

    def __init__(self) -> None:
        self.files = {name: adapter(name, value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))}

    def __call__(self, path: str) -> Adapter:
        if path not in self.files:
            raise AdapterError(f"adapter {path}: there is no such folder")
        return self.files[path]


def make(disk: Disk, host_budget: int = 0, slots: int = 3, mode: str = ON_DEMAND, **more: object) -> AdapterStore:
    device = torch.device("cpu")
    return AdapterStore(SPEC, slots, 4096, device, torch.float32, mode=mode, host_budget=host_budget, read=disk, **more)  # type: ignore[arg-type]


def come(store: AdapterStore, identity: str) -> None:
    """Ask, as the scheduler does, until it is there."""
    for _ in range(3):
        store.want(identity)
        reading = store._registry.held[identity].reading
        if reading is not None:
            reading.exception()
    assert store.ready(identity)


def test_what_left_host_memory_is_read_again() -> None:
    disk = Disk()
    store = make(disk, host_budget=1024)
    for name in "ab":
        store.add(name, disk(name))
    identity = store.resolve("a")
    assert (store.tier(identity), store.tier("b-2.0"), store.host_bytes) == ("disk", "host", 1024)
    come(store, identity)
    assert (store.tier(identity), store.tier("b-2.0"), store.counts(identity).reads) == ("device", "disk", 1)
    start = int(store.pages.table[store.slot(identity), 7, 0])
    assert (store.pages.pool[start : start + 128] == 1.0).all()
    store.check()


@pytest.mark.parametrize(("there", "reason"), [(True, "has changed on disk.*load_inplace"), (False, "no such folder")])
def test_changed_or_lost_files_are_refused_until_they_are_back(there: bool, reason: str) -> None:
    disk = Disk()
    store = make(disk, host_budget=1024)
    for name in "ab":
        store.add(name, disk(name))
    before = disk.files.pop("a")
    if there:
        disk.files["a"] = adapter("a", 9.0)
    identity = store.resolve("a")
    with pytest.raises(RuntimeError, match=reason):
        come(store, identity)
    store.release(identity)
    disk.files["a"] = before
    come(store, store.resolve("a"))
    store.check()


@pytest.mark.parametrize("error", [OSError(5, "broken disk", "/secret/a"), ValueError("/secret/r.json refuses it")])
def test_what_goes_wrong_on_disk_is_told_without_paths(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk()

    def read(path: str) -> Adapter:
        raise error

    store = make(disk, host_budget=1024)
    store._host._read = read
    for name in "ab":
        store.add(name, disk(name))
    with pytest.raises(RuntimeError, match="could not be read again") as refused:
        come(store, store.resolve("a"))
    assert "secret" not in str(refused.value)
    assert "/secret/" in caplog.text


def test_more_than_the_budget_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"needs 1024 bytes of the 1000.*--max-cpu-adapter-gib"):
        make(Disk(), host_budget=1000).add("a", adapter("a", 1.0))


def test_host_memory_is_kept_while_the_device_is_loaded_from_it() -> None:
    disk = Disk()
    store = make(disk, host_budget=1024, mode=PIPELINED, loader=Never())
    identity = store.add("a", disk("a"))
    store.want(identity)
    assert not store.ready(identity)
    store.add("b", disk("b"))
    assert (store.on_host(identity), store.tier("b-2.0")) == (True, "disk")


def test_the_popular_stays_longer_than_the_recent() -> None:
    disk = Disk()
    store = make(disk, slots=2)
    popular, recent, new = (store.add(name, disk(name)) for name in "abc")
    for identity, times in ((popular, 5), (recent, 1)):
        come(store, identity)
        for _ in range(times):
            store.pin(identity)
            store.unpin(identity)
    assert (store.counts(popular).hits, store.counts(recent).hits) == (4, 0)
    come(store, new)
    assert sorted(store.resident()) == sorted([popular, new])
    assert store.counts(recent).evictions == 1


@pytest.mark.parametrize("mode", [ON_DEMAND, PIPELINED])
def test_waiting_for_a_copy_ends(mode: str) -> None:
    now = [0.0]
    store = make(Disk(), mode=mode, loader=Never(), max_seconds=5.0, clock=lambda: now[0])
    store.add("a", adapter("a", 1.0))
    identity = store.resolve("a")
    store.want(identity)
    now[0] = 5.0
    assert not store.ready(identity)
    now[0] = 5.1
    with pytest.raises(TimeoutError, match="did not arrive within 5 s"):
        store.ready(identity)
    store.release(identity)
    again = store.resolve("a")  # a new request tries again
    store.want(again)
    assert not store.ready(again)
    store.check()


def test_who_waits_for_an_arrival_hears_how_it_ended() -> None:
    arrival = CopiedByHost(2)
    with pytest.raises(RuntimeError, match="did not arrive within"):
        arrival.wait(0, 0.0)
    arrival.land()
    arrival.wait(0, 0.0)
    arrival.fail("the bus is gone")
    with pytest.raises(RuntimeError, match="the bus is gone"):
        arrival.wait(1, 60.0)


def test_the_loader_tells_of_copies_that_fail() -> None:
    arrival = Loader().start([[(torch.zeros(2), torch.zeros(3))]], time.monotonic)
    with pytest.raises(RuntimeError, match="copying an adapter to the device failed"):
        arrival.wait(0, 60.0)


def test_unloading_while_it_is_copied_frees_at_once_and_ends_the_copy() -> None:
    loader = Never()
    store = make(Disk(), mode=PIPELINED, loader=loader)
    store.want(store.add("a", adapter("a", 1.0)))
    assert (store.used_bytes, store.host_bytes) == (1024, 1024)
    store.remove("a")
    assert (store.used_bytes, store.host_bytes) == (0, 0)
    assert loader.arrival.cancelled
    store.check()
