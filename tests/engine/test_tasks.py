"""Adapters in the batch and requests that wait for theirs: counts, limits, and what is broken."""

from __future__ import annotations

from inlaid.engine.refusal import Refusal, RefusalKind
from inlaid.engine.request import FinishReason
from inlaid.engine.scheduler import MAX_PARKED
from inlaid.engine.tasks import LOADING, READY, Tasks
from tests.engine.bench import Bench
from tests.engine.fake_runner import FakeAdapters


def resident(*names: str, ranks: int = 8) -> FakeAdapters:
    adapters = FakeAdapters(names, ranks=ranks)
    adapters.resident = dict.fromkeys(names)
    return adapters


def test_counts_pins_and_ranks_follow_the_batch() -> None:
    adapters = resident("a", "b")
    tasks = Tasks(adapters, max_sum_of_ranks=15)
    assert tasks.enter("a")
    assert not tasks.enter("a")
    assert tasks.enter(None)
    assert (tasks.active, adapters.pins) == ({"a": 2, None: 1}, {"a": 2})
    assert not tasks.has_room("b")
    assert tasks.has_room("a")
    assert tasks.has_room(None)
    tasks.leave("a")
    tasks.leave("a")
    assert tasks.active == {None: 1}
    assert tasks.has_room("b")


def test_an_adapter_above_the_limit_runs_alone_rather_than_never() -> None:
    tasks = Tasks(resident("huge", ranks=500), max_sum_of_ranks=64)
    tasks.enter(None)
    assert tasks.has_room("huge")


def test_the_base_is_no_task() -> None:
    tasks = Tasks(resident("a", "b"), max_sum_of_ranks=0)
    tasks.max_tasks = 1
    tasks.enter(None)
    assert not tasks.full
    tasks.enter("a")
    assert tasks.full
    assert not tasks.has_room("b")


def test_states_and_who_is_done_waiting() -> None:
    adapters = FakeAdapters(("here", "coming", "broken"))
    adapters.resident = {"here": None}
    adapters.broken = {"broken"}
    tasks = Tasks(adapters, 0)
    assert [tasks.state(name) for name in (None, "here", "coming")] == [READY, READY, LOADING]
    assert tasks.state("broken") == Refusal("it has NaNs", RefusalKind.FAULT)
    bench = Bench()
    for name in ("here", "coming", "broken"):
        bench.add(name, [1], None)
        request = bench.scheduler.requests[name]
        request.adapter = name
        tasks.park(request, 0.0)
    settled = {request.id: state for request, state in tasks.settled(0.0)}
    assert settled["here"] == READY
    assert settled["broken"] == Refusal("it has NaNs", RefusalKind.FAULT)
    assert (list(tasks.parked), tasks.num_parked) == (["coming"], 1)
    assert tasks.remove(bench.scheduler.requests["coming"])
    assert not tasks.remove(bench.scheduler.requests["coming"])


def test_a_broken_adapter_behind_a_full_park_ends_its_request_alone() -> None:
    names = tuple(f"a{number}" for number in range(MAX_PARKED + 2))
    bench = Bench(adapters=FakeAdapters(names, load=10))
    bench.adapters.broken = {names[-1]}
    for name in names:
        bench.add(name, [1], name, max_tokens=1)
    bench.run()
    assert bench.ends[names[-1]].finish_reason is FinishReason.ERROR
    assert all(bench.ends[name].finish_reason is not FinishReason.ERROR for name in names[:-1])
    bench.check_all()
