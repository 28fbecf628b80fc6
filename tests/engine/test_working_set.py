"""Adapters in the batch and requests that wait for theirs: counts, limits, and what is broken."""

from __future__ import annotations

from inlaid.engine.admission import MAX_AWAITED
from inlaid.engine.refusal import Refusal, RefusalKind
from inlaid.engine.request import FinishReason
from inlaid.engine.working_set import LOADING, READY, WorkingSet
from tests.engine.bench import Bench
from tests.engine.fake_runner import FakeAdapters


def resident(*names: str, ranks: int = 8) -> FakeAdapters:
    adapters = FakeAdapters(names, ranks=ranks)
    adapters.resident = dict.fromkeys(names)
    return adapters


def test_counts_pins_and_ranks_follow_the_batch() -> None:
    adapters = resident("a", "b")
    working_set = WorkingSet(adapters, max_sum_of_ranks=15)
    working_set.enter("a")
    working_set.enter("a")
    working_set.enter(None)
    assert (working_set.active, adapters.pins) == ({"a": 2, None: 1}, {"a": 2})
    assert not working_set.has_room("b")
    assert working_set.has_room("a")
    assert working_set.has_room(None)
    working_set.leave("a")
    working_set.leave("a")
    assert working_set.active == {None: 1}
    assert working_set.has_room("b")


def test_an_adapter_above_the_limit_runs_alone_rather_than_never() -> None:
    working_set = WorkingSet(resident("huge", ranks=500), max_sum_of_ranks=64)
    working_set.enter(None)
    assert working_set.has_room("huge")


def test_the_base_does_not_count_as_an_adapter() -> None:
    working_set = WorkingSet(resident("a", "b"), max_sum_of_ranks=0)
    working_set.max_adapters = 1
    working_set.enter(None)
    assert not working_set.full
    working_set.enter("a")
    assert working_set.full
    assert not working_set.has_room("b")


def test_states_and_who_is_done_waiting() -> None:
    adapters = FakeAdapters(("here", "coming", "broken"))
    adapters.resident = {"here": None}
    adapters.broken = {"broken"}
    working_set = WorkingSet(adapters, 0)
    assert [working_set.state(name) for name in (None, "here", "coming")] == [READY, READY, LOADING]
    assert working_set.state("broken") == Refusal("it has NaNs", RefusalKind.FAULT)
    bench = Bench()
    for name in ("here", "coming", "broken"):
        bench.add(name, [1], None)
        progress = bench.scheduler.state.progress[name]
        progress.request.adapter = name
        working_set.set_aside(progress, 0.0)
    settled = {progress.request.id: state for progress, state in working_set.take_settled(0.0)}
    assert settled["here"] == READY
    assert settled["broken"] == Refusal("it has NaNs", RefusalKind.FAULT)
    assert (list(working_set.aside), working_set.num_aside) == (["coming"], 1)
    assert working_set.remove(bench.scheduler.state.progress["coming"])
    assert not working_set.remove(bench.scheduler.state.progress["coming"])


def test_a_broken_adapter_beyond_those_awaited_ends_its_request_alone() -> None:
    names = tuple(f"a{number}" for number in range(MAX_AWAITED + 2))
    bench = Bench(adapters=FakeAdapters(names, load=10))
    bench.adapters.broken = {names[-1]}
    for name in names:
        bench.add(name, [1], name, max_tokens=1)
    bench.run()
    assert bench.ends[names[-1]].finish_reason is FinishReason.ERROR
    assert all(bench.ends[name].finish_reason is not FinishReason.ERROR for name in names[:-1])
    bench.check_all()
