"""The scheduler with a runner that notices every wrong block: outputs equal the oracle's whatever happens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.engine.policy import POLICIES, MaxTokens
from inlaid.engine.recovery import MAX_RUNS
from inlaid.engine.refusal import Refusal, RefusalKind, Refused
from inlaid.engine.request import FinishReason, Request
from tests.engine.bench import ADAPTERS, Bench
from tests.engine.fake_runner import EOS, FakeAdapters, generate
from tests.examples import examples


def _refusal(bench: Bench, id: str) -> Refusal:
    refusal = bench.ends[id].refusal
    assert refusal is not None
    return refusal


def _message(bench: Bench, id: str) -> str:
    return _refusal(bench, id).message


def both(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("overlap", [False, True])(test)


@both
def test_one_request_gets_the_oracles_tokens(overlap: bool) -> None:
    bench = Bench(overlap=overlap)
    bench.add("r", [1, 2, 3], max_tokens=5, ignore_eos=True)
    bench.run().check_all()
    assert len(bench.tokens["r"]) == 5
    assert bench.firsts["r"].queue_time == 1.0


@both
def test_the_time_that_a_request_waits_for_its_adapter_is_told(overlap: bool) -> None:
    bench = Bench(overlap=overlap, adapters=FakeAdapters(("a", "b"), load=4))
    bench.adapters.resident["b"] = None
    bench.add("cold", [1, 2, 3], adapter="a", max_tokens=3, ignore_eos=True)
    bench.add("warm", [1, 2, 3], adapter="b", max_tokens=3, ignore_eos=True)
    bench.run().check_all()
    cold, warm = bench.firsts["cold"], bench.firsts["warm"]
    assert (cold.queue_time, cold.adapter_time) == (5.0, 4.0)
    assert (warm.queue_time, warm.adapter_time) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("took", "told"), [((1.0, 2.0), (1.0, 2.0)), ((9.0, 1.0), (3.0, 1.0)), ((0.0, 9.0), (0.0, 4.0))]
)
def test_the_wait_for_an_adapter_is_split_by_what_its_load_took(
    took: tuple[float, float], told: tuple[float, float]
) -> None:
    bench = Bench(adapters=FakeAdapters(("a",), load=4))
    bench.adapters.seconds = took
    bench.add("cold", [1, 2, 3], adapter="a", max_tokens=3, ignore_eos=True)
    bench.run().check_all()
    first = bench.firsts["cold"]
    assert (first.adapter_read, first.adapter_copy) == told
    assert first.adapter_time == 4.0


def test_the_hosts_seconds_are_shared_by_the_requests_of_a_step() -> None:
    """Show that the seconds from the end of a step to the submission of the next are divided among its requests."""
    bench = Bench()
    bench.add("long", [1, 2, 3], max_tokens=4, ignore_eos=True)
    bench.add("short", [1, 2], max_tokens=2, ignore_eos=True)
    bench.engine.clock = itertools.count(step=0.5).__next__  # a half from the making of a step to its submission
    bench.run().check_all()
    first, both = bench.ends["short"].host_time, bench.ends["long"].host_time
    assert first > 0
    assert both == pytest.approx(3 * first), "two steps of two requests, and two alone"


@both
def test_long_prompts_are_prefilled_in_chunks_beside_decodes(overlap: bool) -> None:
    bench = Bench(overlap=overlap)
    bench.add("short", [1], max_tokens=12, ignore_eos=True)
    bench.step()
    bench.add("long", list(range(40)), max_tokens=3, ignore_eos=True)
    bench.run().check_all()
    chunks = [w.num_tokens for b in bench.runner.batches for w in b.works if w.request.id == "long"]
    assert chunks[:3] == [15, 15, 10]


def test_without_chunking_a_prompt_waits_for_a_step_that_holds_it() -> None:
    bench = Bench(enable_chunked_prefill=False)
    for index in range(3):
        bench.add(f"r{index}", [index + 1] * 9, max_tokens=3, ignore_eos=True)
    with pytest.raises(ValueError, match="chunked prefill is off"):
        bench.add("long", [1] * 15, max_tokens=3)
    bench.run().check_all()
    assert all(w.num_tokens in (1, 9) for b in bench.runner.batches for w in b.works)


@both
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_crowd_in_too_little_memory_is_preempted_and_resumed_exactly(overlap: bool, policy: str) -> None:
    bench = Bench(num_blocks=14, overlap=overlap, policy=policy, admission_margin=0.0, reserve=0.0)
    for index in range(9):
        adapter = (None, *ADAPTERS)[index % 5]
        bench.add(f"r{index}", [index, 1, 2], adapter, f"t{index % 3}", max_tokens=25, ignore_eos=True)
    bench.run().check_all()
    assert bench.scheduler.num_preemptions > 0


def test_who_finds_no_memory_is_not_predicted_yet() -> None:
    """A prediction is made once: later, when more answers have been seen, it is better. One made when a request was
    looked at first, and had to wait, cost thirty times the preemptions and 2% of the throughput under overload."""
    asked: list[str] = []

    class Asked(MaxTokens):
        def remaining(self, request: Request) -> float:
            asked.append(request.id)
            return super().remaining(request)

    bench = Bench(num_blocks=11, lengths=Asked())
    bench.add("first", list(range(10, 30)), max_tokens=8, ignore_eos=True)
    bench.step()
    bench.add("second", list(range(30, 54)), max_tokens=4, ignore_eos=True)
    while "first" not in bench.ends:
        bench.step()
        assert "second" not in asked
        assert bench.scheduler.num_running < 2
    bench.step()
    bench.add("third", [7, 8, 9], max_tokens=4, ignore_eos=True)
    bench.run().check_all()
    assert "third" in asked, "beside others there is one, when there is room"


@both
def test_a_shared_prefix_is_computed_once_and_its_last_token_always(overlap: bool) -> None:
    bench = Bench(overlap=overlap)
    prompt = list(range(16))
    bench.add("first", prompt, "a", max_tokens=2, ignore_eos=True)
    bench.run()
    bench.add("same", prompt, "a", max_tokens=2, ignore_eos=True)
    bench.add("longer", [*prompt, 3, 4, 5], "a", max_tokens=2, ignore_eos=True)
    bench.add("other", prompt, "b", max_tokens=2, ignore_eos=True)
    bench.add("base", prompt, max_tokens=2, ignore_eos=True)
    bench.run().check_all()
    assert bench.firsts["first"].num_cached == 0
    assert bench.firsts["same"].num_cached == 12
    assert bench.firsts["longer"].num_cached == 16
    assert bench.firsts["other"].num_cached == 0
    assert bench.firsts["base"].num_cached == 0


def test_outputs_are_found_again_in_the_next_turn_of_a_chat() -> None:
    bench = Bench()
    bench.add("turn", [1, 2, 3, 4], max_tokens=6, ignore_eos=True)
    bench.run()
    bench.add("next", [1, 2, 3, 4, *bench.tokens["turn"], 9], max_tokens=2, ignore_eos=True)
    bench.run().check_all()
    assert bench.firsts["next"].num_cached == 8


@both
def test_an_answer_that_a_stop_string_or_a_preemption_ended_is_found_again_too(overlap: bool) -> None:
    bench = Bench(overlap=overlap)
    bench.add("stopped", [1, 2, 3, 4], max_tokens=40, ignore_eos=True)
    for _ in range(10):
        bench.step()
    bench.engine.abort("stopped", FinishReason.STOP)
    bench.run()
    made = bench.tokens["stopped"]
    assert len(made) >= 8
    bench.add("next", [1, 2, 3, 4, *made, 9], max_tokens=30, ignore_eos=True)
    for _ in range(10):
        bench.step()
    known = len(bench.scheduler.requests["next"].tokens) - 1
    bench.scheduler.preempt("next")
    before = len(bench.runner.batches)
    bench.run()
    assert bench.tokens["next"] == bench.expected("next")
    assert bench.firsts["next"].num_cached == (3 + len(made)) // 4 * 4
    again = next(w for batch in bench.runner.batches[before:] for w in batch.works)
    assert again.start == known // 4 * 4


@both
@pytest.mark.parametrize("steps", range(1, 9))
def test_what_is_not_computed_yet_is_not_named(overlap: bool, steps: int) -> None:
    bench = Bench(overlap=overlap, max_num_batched_tokens=4)
    bench.add("cut", list(range(14)), max_tokens=9, ignore_eos=True)
    for _ in range(steps):
        bench.step()
    bench.engine.abort("cut")
    committed = steps - 1 if overlap else steps
    computed = min(14, 4 * committed) + max(0, committed - 4)
    assert bench.scheduler.pool.num_cached == computed // 4
    bench.run()
    bench.add("again", list(range(14)), max_tokens=9, ignore_eos=True)
    bench.run().check_all()


def test_tenants_share_no_prefix_when_isolated() -> None:
    bench = Bench(cache={"isolate_tenants": True})
    for tenant in ("x", "y"):
        bench.add(tenant, [1] * 9, tenant=tenant, max_tokens=2, ignore_eos=True)
        bench.run()
    bench.add("x2", [1] * 9, tenant="x", max_tokens=2, ignore_eos=True)
    bench.run()
    assert [bench.firsts[id].num_cached for id in ("x", "y", "x2")] == [0, 0, 8]


def test_a_new_base_version_meets_no_old_kv() -> None:
    bench = Bench()
    bench.add("old", [1] * 9, max_tokens=30, ignore_eos=True)
    for _ in range(4):
        bench.step()
    bench.scheduler.set_base_version("v2")
    before = len(bench.runner.batches)
    bench.run().check_all()
    assert bench.runner.batches[before].works[0].start == 0
    bench.add("new", [1] * 9, max_tokens=2, ignore_eos=True)
    bench.run()
    assert bench.firsts["new"].num_cached == 8


@both
def test_stop_ids_eos_and_min_tokens(overlap: bool) -> None:
    prompt = next(p for p in ([k, 2] for k in range(500)) if EOS in generate(p, None, 8) and p)
    free = generate(prompt, None, 12, frozenset())
    bench = Bench(overlap=overlap)
    bench.add("eos", prompt, max_tokens=12)
    bench.add("ignored", prompt, max_tokens=12, ignore_eos=True)
    bench.add("id", prompt, max_tokens=12, ignore_eos=True, stop_token_ids=(free[1],))
    bench.add("late", prompt, max_tokens=12, min_tokens=12)
    bench.run()
    assert bench.tokens["eos"] == free[: free.index(EOS) + 1]
    assert bench.ends["eos"].stop_token == EOS
    assert bench.tokens["ignored"] == free
    assert bench.tokens["id"] == free[: free.index(free[1]) + 1]
    assert bench.ends["id"].stop_token == free[1]
    assert len(bench.tokens["late"]) == 12


@both
def test_max_model_len_ends_a_request(overlap: bool) -> None:
    bench = Bench(max_model_len=10, overlap=overlap)
    bench.add("r", [1] * 6, max_tokens=100, ignore_eos=True)
    bench.run().check_all()
    assert len(bench.tokens["r"]) == 4
    assert bench.ends["r"].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "empty"),
        ([1] * 64, {}, "at most"),
        ([1], {"max_tokens": 0}, "max_tokens is 0"),
        ([1] * 30, {"max_tokens": 30}, "KV blocks"),
        ([1], {"deadline": float("nan")}, "deadline is nan"),
    ],
)
def test_what_can_never_be_served_is_refused_with_its_reason(prompt: list[int], params: Any, message: str) -> None:
    bench = Bench(num_blocks=9)
    with pytest.raises(Refused, match=message) as refused:
        bench.add("r", prompt, **params)
    assert refused.value.refusal.kind is RefusalKind.INVALID
    assert not bench.engine.has_work


def test_an_id_in_use_and_an_unknown_adapter_are_refused() -> None:
    bench = Bench()
    bench.add("r", [1])
    with pytest.raises(ValueError, match="in use"):
        bench.add("r", [1])
    with pytest.raises(Refused, match="unknown") as refused:
        bench.add("s", [1], "nobody")
    assert refused.value.refusal.kind is RefusalKind.NOT_FOUND


@both
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_abort_at_any_moment_frees_everything(overlap: bool, after: int) -> None:
    bench = Bench(num_blocks=14, overlap=overlap)
    for index in range(6):
        bench.add(f"r{index}", [index, 1, 2, 3, 4], "a", max_tokens=20, ignore_eos=True)
    for _ in range(after):
        bench.step()
    for index in range(0, 6, 2):
        assert bench.engine.abort(f"r{index}")
        assert not bench.engine.abort(f"r{index}")
    bench.run().check_all()
    assert [bench.ends[f"r{i}"].finish_reason for i in range(6)] == [FinishReason.ABORT, FinishReason.LENGTH] * 3


@both
def test_prompt_logprobs_skip_the_prefix_cache_and_come_once(overlap: bool) -> None:
    bench = Bench(overlap=overlap)
    prompt = list(range(20))
    bench.add("warm", prompt, max_tokens=1, ignore_eos=True)
    bench.run()
    bench.add("scored", prompt, max_tokens=2, ignore_eos=True, prompt_logprobs=0)
    bench.add("only", prompt, max_tokens=0, prompt_logprobs=0)
    bench.run()
    for id in ("scored", "only"):
        logprobs = bench.firsts[id].prompt_logprobs
        assert logprobs is not None
        assert logprobs[0] is None
        assert [entry.token for entry in logprobs[1:] if entry] == prompt[1:]
        assert bench.firsts[id].num_cached == 0
    assert bench.tokens["only"] == []
    assert bench.ends["scored"].prompt_logprobs is None
    assert len(bench.tokens["scored"]) == 2


@both
@pytest.mark.parametrize("where", ["submit", "collect"])
@pytest.mark.parametrize("adapter", [None, "a"])
def test_only_the_request_that_a_step_fails_on_dies(overlap: bool, where: str, adapter: str | None) -> None:
    bench = Bench(overlap=overlap)
    for index in range(3):
        bench.add(f"r{index}", [index, 1, 2, 3, 4], adapter, max_tokens=12, ignore_eos=True)
    for _ in range(4):
        bench.step()
    bench.add("bad", [5, 6, 7], adapter, max_tokens=12, ignore_eos=True)
    bench.runner.poison["bad"] = where
    for _ in range(2):
        bench.step()
    bench.add("late", [8, 9], adapter, max_tokens=12, ignore_eos=True)
    bench.run().check_all()
    assert "IndexError: no embedding for bad" in _message(bench, "bad")
    assert _refusal(bench, "bad").kind is RefusalKind.FAULT
    assert [bench.ends[id].finish_reason for id in ("r0", "r1", "r2", "late")] == [FinishReason.LENGTH] * 4
    assert bench.engine.num_failures == 1
    assert bench.engine.num_failures_in_a_row == 0


@both
def test_a_request_that_turns_bad_in_mid_answer_leaves_the_others_whole(overlap: bool) -> None:
    bench = Bench(overlap=overlap, max_num_seqs=8)
    for index in range(8):
        bench.add(f"r{index}", [index, 1, 2], max_tokens=20, ignore_eos=True)
    for _ in range(7):
        bench.step()
    bench.runner.poison |= {"r2": "collect", "r5": "submit"}
    bench.run().check_all()
    died = {id for id, output in bench.ends.items() if output.finish_reason is FinishReason.ERROR}
    assert died == {"r2", "r5"}
    assert all(len(bench.tokens[id]) == 20 for id in bench.ends if id not in died)


@both
def test_a_broken_device_is_given_up_after_a_bounded_number_of_runs(overlap: bool) -> None:
    bench = Bench(overlap=overlap, num_blocks=1000, max_num_seqs=200, max_num_batched_tokens=200)
    for index in range(200):
        bench.add(f"r{index}", [index], max_tokens=3, ignore_eos=True)
    bench.runner.fail_collect.update(range(1, 100))
    bench.run()
    assert {output.finish_reason for output in bench.ends.values()} == {FinishReason.ERROR}
    assert len(bench.runner.batches) <= MAX_RUNS + 2
    assert bench.engine.num_failures_in_a_row == 1
    bench.check_all()


@both
@pytest.mark.parametrize("where", ["fail_submit", "fail_collect"])
def test_a_step_that_raises_ends_its_requests_and_nobody_elses(overlap: bool, where: str) -> None:
    bench = Bench(overlap=overlap)
    getattr(bench.runner, where).add(3)
    bench.add("in it", [1, 2], max_tokens=9, ignore_eos=True)
    for _ in range(2):
        bench.step()
    bench.step()
    if overlap:
        bench.step()
    assert bench.ends["in it"].finish_reason is FinishReason.ERROR
    assert "RuntimeError: the device" in _message(bench, "in it")
    bench.add("after", [1, 2], max_tokens=9, ignore_eos=True)
    bench.run().check_all()
    assert bench.ends["after"].finish_reason is FinishReason.LENGTH
    assert bench.engine.num_failures == 1


def test_a_loading_adapter_holds_up_nobody_else() -> None:
    bench = Bench(adapters=FakeAdapters(ADAPTERS, load=5))
    bench.add("slow", [1, 2], "a", max_tokens=2, ignore_eos=True)
    bench.add("base", [1, 2], max_tokens=2, ignore_eos=True)
    for _ in range(3):
        bench.step()
    assert "base" in bench.ends
    assert "slow" not in bench.firsts
    bench.run().check_all()


def test_a_broken_adapter_ends_its_requests_with_the_reason() -> None:
    bench = Bench(adapters=FakeAdapters(ADAPTERS, load=3))
    bench.add("parked", [1], "a")
    bench.step()
    bench.adapters.broken.add("a")
    bench.add("fresh", [1], "a")
    bench.run()
    assert [_message(bench, id) for id in ("parked", "fresh")] == ["adapter 'a': it has NaNs"] * 2
    assert (_refusal(bench, "fresh").kind, _refusal(bench, "fresh").retry_after) == (RefusalKind.FAULT, None)
    bench.check_all()


def test_a_request_waits_for_its_adapter_no_longer_than_allowed() -> None:
    """Counted for each request from when it first stepped aside, on the engine's clock; the others are served."""
    bench = Bench(adapters=FakeAdapters(ADAPTERS, slots=1), max_adapter_wait=5.0)
    bench.add("holder", [1], "a", max_tokens=30, ignore_eos=True)
    bench.step()
    bench.step()
    bench.add("early", [1], "b")
    bench.step()
    for _ in range(4):
        bench.step()
    bench.add("late", [1], "b", max_tokens=2, ignore_eos=True)
    assert "early" not in bench.ends
    bench.step()
    bench.step()
    assert "not on the device within 5 s" in _message(bench, "early")
    assert (_refusal(bench, "early").retry_after or 0) >= 1
    assert "late" not in bench.ends
    bench.engine.abort("holder")
    bench.run()
    assert bench.ends["late"].finish_reason is FinishReason.LENGTH
    bench.check_all()


def test_when_the_one_that_all_waited_for_is_given_up_the_others_go_on() -> None:
    """Too many have passed it, so nobody else's adapter is admitted; then its client goes away."""
    bench = Bench(adapters=FakeAdapters(ADAPTERS, slots=1, load=100), max_overtakes=2)
    bench.adapters.resident["b"] = None
    bench.add("overdue", [1], "d", max_tokens=2, ignore_eos=True)
    bench.step()
    for index in range(3):
        bench.add(f"r{index}", [1, 2], max_tokens=2, ignore_eos=True)
    for _ in range(6):
        bench.step()
    bench.add("waits", [1], "b", max_tokens=2, ignore_eos=True)
    for _ in range(4):
        bench.step()
    assert "waits" not in bench.ends
    bench.engine.abort("overdue")
    bench.run(20).check_all()


def test_the_overtaking_bound_makes_room_for_an_adapter_that_finds_no_slot() -> None:
    bench = Bench(adapters=FakeAdapters(ADAPTERS, slots=1), max_overtakes=6, max_num_seqs=2)
    bench.add("seed", [1], "a", max_tokens=4, ignore_eos=True)
    bench.step()
    bench.step()
    bench.add("lonely", [1], "b", max_tokens=2, ignore_eos=True)
    for index in range(40):
        bench.add(f"crowd{index}", [index], "a", max_tokens=4, ignore_eos=True)
    order: list[str] = []
    while bench.engine.has_work:
        order += [output.id for output in bench.step() if output.finish_reason]
    assert order.index("lonely") <= 10
    bench.check_all()


def test_a_small_request_passes_one_that_does_not_fit_but_not_forever() -> None:
    bench = Bench(num_blocks=9, max_overtakes=3, admission_margin=0.0)
    bench.add("holder", [1] * 4, max_tokens=20, ignore_eos=True)
    bench.step()
    bench.add("big", [2] * 28, max_tokens=2, ignore_eos=True)
    for index in range(8):
        bench.add(f"small{index}", [index], max_tokens=2, ignore_eos=True)
    started: list[str] = []
    while bench.engine.has_work:
        bench.step()
        started += [id for id in bench.scheduler.state.running if id not in started]
    bench.check_all()
    assert started.index("big") == 4  # the holder, three that passed, then big


def test_tasks_and_ranks_in_a_step_are_bounded() -> None:
    for limits in ({"max_tasks_per_step": 2}, {"max_sum_of_ranks": 16}, {"policy": "inlaid:beta=2"}):
        bench = Bench(**limits)
        for index in range(12):
            bench.add(f"r{index}", [index], ADAPTERS[index % 4], max_tokens=3, ignore_eos=True)
        bench.run().check_all()
        most = max(len({work.request.adapter for work in batch.works}) for batch in bench.runner.batches)
        assert most == 2


def test_a_full_queue_refuses_with_a_time_but_not_those_below_their_share() -> None:
    bench = Bench(max_num_waiting=10)
    for index in range(10):
        bench.add(f"r{index}", [1], tenant="flood")
    with pytest.raises(Refused, match="waiting") as caught:
        bench.add("more", [1], tenant="flood")
    assert (caught.value.retry_after or 0) >= 1
    for index in range(5):
        bench.add(f"s{index}", [1], tenant="small")
    with pytest.raises(Refused):
        bench.add("s5", [1], tenant="small")
    bench.run().check_all()


def test_nothing_to_do_is_no_batch() -> None:
    bench = Bench()
    assert not bench.engine.has_work
    assert bench.engine.step() == []
    assert bench.engine.idle
    assert bench.runner.batches == []


requests = st.lists(
    st.tuples(
        st.integers(0, 12),  # the step at which it arrives
        st.lists(st.integers(0, 2), min_size=1, max_size=24),
        st.sampled_from([None, *ADAPTERS]),
        st.integers(1, 20),
        st.booleans(),
        st.one_of(st.none(), st.integers(0, 30)),  # the step at which it is aborted
    ),
    min_size=1,
    max_size=12,
)


@examples(120)
@given(
    requests=requests,
    overlap=st.booleans(),
    policy=st.sampled_from(sorted(POLICIES)),
    num_blocks=st.integers(12, 40),
    slots=st.integers(1, 4),
    failing=st.sets(st.integers(1, 30), max_size=2),
    poison=st.dictionaries(st.integers(0, 11), st.sampled_from(["submit", "collect"]), max_size=2),
    data=st.data(),
)
def test_any_storm_leaves_the_pool_whole_and_every_answer_exact(
    requests: Any,
    overlap: bool,
    policy: str,
    num_blocks: int,
    slots: int,
    failing: set[int],
    poison: dict[int, str],
    data: st.DataObject,
) -> None:
    bench = Bench(
        num_blocks=num_blocks,
        overlap=overlap,
        policy=policy,
        adapters=FakeAdapters(ADAPTERS, slots=slots, load=2),
        max_num_seqs=4,
        max_overtakes=3,
        reserve=data.draw(st.sampled_from([0.0, 0.5])),
    )
    getattr(bench.runner, data.draw(st.sampled_from(["fail_submit", "fail_collect"]))).update(failing)
    turns_bad = data.draw(st.integers(0, 10))
    for step in range(40):
        if step == turns_bad:
            bench.runner.poison.update({f"r{index}": where for index, where in poison.items()})
        for index, (arrives, prompt, adapter, count, ignore_eos, aborted) in enumerate(requests):
            if arrives == step:
                bench.add(f"r{index}", prompt, adapter, f"t{index % 3}", max_tokens=count, ignore_eos=ignore_eos)
            if aborted == step:
                bench.engine.abort(f"r{index}")
        bench.step()
    bench.run().check_all()
    ledger = bench.scheduler.ledger
    assert ledger.total == pytest.approx(sum(a.service for a in ledger.accounts.values()))
