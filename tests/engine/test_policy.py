"""Each policy is the order it says it is, with its bound; alone and under everything else at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.engine.policy import POLICIES, make_policy, parse_policy
from inlaid.engine.predictor import Oracle
from inlaid.engine.refusal import Refused
from inlaid.engine.request import FinishReason
from tests.engine.bench import ADAPTERS, Bench
from tests.engine.fake_runner import FakeAdapters
from tests.examples import examples


def order_of(bench: Bench) -> list[str]:
    """Return the ids in the order in which they first run."""
    seen: dict[str, None] = {}
    while bench.engine.has_work:
        bench.step()
        for work in bench.runner.batches[-1].works:
            seen.setdefault(work.request.id)
    return list(seen)


def one_by_one(policy: str, **config: Any) -> Bench:
    return Bench(policy=policy, max_num_seqs=1, lengths=Oracle(), **config)


def test_fcfs_priority_and_srtf() -> None:
    wanted = {"fcfs": "abc", "priority": "cba", "srtf": "bca"}
    for policy, order in wanted.items():
        bench = one_by_one(policy)
        for id, length, priority in (("a", 12, 2), ("b", 3, 1), ("c", 8, 0)):
            bench.add(id, [1], max_tokens=length, ignore_eos=True, true_output_len=length, priority=priority)
        assert "".join(order_of(bench)) == order


def test_a_long_request_ages_past_a_stream_of_short_ones() -> None:
    bench = one_by_one("srtf:ageing=4")
    bench.add("long", [1], max_tokens=40, ignore_eos=True, true_output_len=40)
    order: list[str] = []
    for number in range(40):
        bench.add(f"s{number}", [1], max_tokens=2, ignore_eos=True, true_output_len=2)
        bench.step()
        bench.step()
        order += [id for id in bench.scheduler.state.running if id not in order]
        if "long" in order:
            break
    # Passed only by those that came within (40 - 2) / 4 = 9.5 s of it; two steps, so two seconds, lie between them.
    assert "long" in order
    assert order.index("long") <= 6


def test_with_neither_ageing_nor_seniority_it_would_starve() -> None:
    bench = one_by_one("srtf:ageing=0,seniority=1000")
    bench.add("long", [1], max_tokens=40, ignore_eos=True, true_output_len=40)
    for number in range(40):
        bench.add(f"s{number}", [1], max_tokens=2, ignore_eos=True, true_output_len=2)
        bench.step()
        bench.step()
    assert bench.scheduler.state.progress["long"].first_scheduled is None


def test_inlaid_takes_first_the_tasks_in_the_batch_while_no_other_may_enter() -> None:
    for beta, order in (("1", ["run", "same", "other"]), ("2", ["run", "other", "same"])):
        bench = Bench(policy=f"inlaid:beta={beta}", max_num_seqs=2, lengths=Oracle())
        bench.add("run", [1], "a", max_tokens=30, ignore_eos=True, true_output_len=30)
        bench.add("one", [1], "a", max_tokens=4, ignore_eos=True, true_output_len=4)
        for _ in range(2):  # the adapters come after the first
            bench.step()
        bench.add("other", [1], "c", max_tokens=5, ignore_eos=True, true_output_len=5)
        bench.add("same", [1], "a", max_tokens=20, ignore_eos=True, true_output_len=20)
        assert [id for id in order_of(bench) if id != "one"] == order


Jobs = list[tuple[str, int, int]]  # adapter, length and arrival
jobs = st.lists(st.tuples(st.sampled_from(ADAPTERS), st.integers(1, 30), st.integers(0, 60)), min_size=2, max_size=24)


def serve_jobs(policy: str, jobs: Jobs, **config: Any) -> dict[str, tuple[float, float]]:
    """Serve jobs with every adapter on the device; return when each came and when it first ran."""
    adapters = FakeAdapters(ADAPTERS)
    adapters.resident = dict.fromkeys(ADAPTERS)
    bench = Bench(policy=policy, lengths=Oracle(), adapters=adapters, **config)
    arrivals = sorted((when, place, task, length) for place, (task, length, when) in enumerate(jobs))
    times: dict[str, tuple[float, float]] = {}
    while arrivals or bench.engine.has_work:
        while arrivals and arrivals[0][0] <= bench.time:
            _, place, task, length = arrivals.pop(0)
            bench.add(f"r{place}", [1], task, max_tokens=length, ignore_eos=True, true_output_len=length)
        before = len(bench.runner.batches)
        bench.step()
        for work in bench.runner.batches[-1].works if len(bench.runner.batches) > before else ():
            times.setdefault(work.request.id, (work.request.arrival, bench.time))
    bench.check_all()
    assert set(times) == set(bench.wanted)
    return times


@examples(60)
@given(
    jobs=jobs,
    policy=st.sampled_from(["srtf:seniority=8", "inlaid:seniority=8,beta=1", "inlaid:seniority=8,beta=3,ageing=0"]),
    seats=st.integers(1, 3),
)
def test_no_later_request_starts_before_a_senior(jobs: Jobs, policy: str, seats: int) -> None:
    """Later requests overtake one in its first `seniority` seconds only, however many tasks may be in a step."""
    times = serve_jobs(policy, jobs, max_num_seqs=seats)
    for arrival, start in times.values():
        for other_arrival, other_start in times.values():
            if other_arrival > arrival and other_start >= arrival + 8:
                assert start <= other_start


@examples(60)
@given(jobs=jobs, policy=st.sampled_from(["srtf:seniority=8", "inlaid:seniority=8,beta=1"]))
def test_nobody_waits_longer_than_the_bound_beyond_first_come_first_served(jobs: Jobs, policy: str) -> None:
    """The bound is `seniority`, and the end of the answer that has the seat then."""
    fcfs, ours = (serve_jobs(name, jobs, max_num_seqs=1) for name in ("fcfs", policy))
    longest = max(length for _, length, _ in jobs)
    for id, (arrival, start) in ours.items():
        assert start - arrival <= fcfs[id][1] - arrival + 8 + longest


def test_without_seniority_the_bound_does_not_hold() -> None:
    jobs = [("a", 40, 0), *(("b", 2, when) for when in range(0, 60, 2))]
    waits = {}
    for seniority in (8, 1000):
        arrival, start = serve_jobs(f"srtf:ageing=0,seniority={seniority}", jobs, max_num_seqs=1)["r0"]
        waits[seniority] = start - arrival
    assert waits[8] <= 8 + 2 + 1 < 50 < waits[1000]


def test_a_preempted_request_becomes_senior_too() -> None:
    bench = Bench(policy="srtf:seniority=6", max_num_seqs=1, lengths=Oracle())
    bench.add("old", [1], max_tokens=20, ignore_eos=True, true_output_len=20)
    bench.step()
    bench.scheduler.preempt("old")
    for number in range(20):
        bench.add(f"s{number}", [1], max_tokens=2, ignore_eos=True, true_output_len=2)
    bench.scheduler.set_policy(make_policy("fcfs"))
    bench.scheduler.set_policy(make_policy("srtf", {"seniority": 6.0}))  # who waits is watched again
    assert order_of(bench).index("old") <= 4
    bench.check_all()


def test_vtc_serves_tenants_alike_and_by_weight() -> None:
    for weights, shares in (({}, (0.5, 0.5)), ({"a": 3.0}, (0.75, 0.25))):
        bench = Bench(policy="vtc", max_num_seqs=2)
        bench.scheduler.ledger.set_weights(weights)
        for index in range(60):
            bench.add(f"a{index}", [1] * 4, tenant="a", max_tokens=4, ignore_eos=True)
            bench.add(f"b{index}", [1] * 4, tenant="b", max_tokens=4, ignore_eos=True)
        for _ in range(80):
            bench.step()
        accounts = bench.scheduler.ledger.accounts
        total = accounts["a"].service + accounts["b"].service
        assert accounts["a"].service / total == pytest.approx(shares[0], abs=0.05)


def test_lcf_pays_back_idleness_and_vtc_does_not() -> None:
    ahead = {}
    for policy in ("lcf", "vtc"):
        bench = Bench(policy=policy, max_num_seqs=1, block_size=4)
        for index in range(100):
            bench.add(f"busy{index}", [index % 40] * 4, tenant="busy", max_tokens=2, ignore_eos=True)
        for _ in range(60):
            bench.step()
        for index in range(20):
            bench.add(f"late{index}", [index % 40] * 4, tenant="late", max_tokens=2, ignore_eos=True)
        started: list[str] = []
        for _ in range(40):
            bench.step()
            started += [w.request.id for w in bench.runner.batches[-1].works if w.request.id not in started]
        ahead[policy] = sum(id.startswith("late") for id in started)
    assert ahead["lcf"] >= 19
    assert ahead["vtc"] <= 12


def test_drr_gives_turns_of_a_quantum() -> None:
    bench = Bench(policy="drr:quantum=60", max_num_seqs=1)
    for index in range(20):
        for tenant in "abc":
            bench.add(
                f"{tenant}{index}",
                [1] * 4,
                tenant=tenant,
                max_tokens=4,
                ignore_eos=True,
            )
    turns = "".join(id[0] for id in order_of(bench))
    assert turns.startswith(("aaaaabbbbbccccc", "aaaaaabbbbbbcccccc"))


def test_rpm_refuses_at_once_and_lets_in_again_when_the_window_has_moved() -> None:
    bench = Bench(policy="rpm:limit=3,window=10")
    for index in range(3):
        bench.add(f"r{index}", [1], tenant="t", max_tokens=1)
    with pytest.raises(Refused, match="3 requests per 10 s") as caught:
        bench.add("r3", [1], tenant="t")
    assert caught.value.retry_after == pytest.approx(10.0)
    bench.add("other", [1], tenant="u", max_tokens=1)
    bench.time += 10.5
    bench.add("r3", [1], tenant="t", max_tokens=1)
    bench.run()


def test_slo_takes_the_least_slack_and_gives_up_the_hopeless() -> None:
    for late, reason in (("last", FinishReason.LENGTH), ("refuse", FinishReason.ERROR)):
        bench = one_by_one(f"slo:late={late}", overlap=True)  # a step takes one second
        bench.add("warm", [1], max_tokens=10, ignore_eos=True, true_output_len=10)
        for _ in range(5):
            bench.step()
        bench.add("relaxed", [1], max_tokens=3, ignore_eos=True, deadline=90.0, true_output_len=3)
        bench.add("urgent", [1], max_tokens=3, ignore_eos=True, deadline=40.0, true_output_len=3)
        bench.add("hopeless", [1], max_tokens=30, ignore_eos=True, deadline=20.0, true_output_len=30)
        order = order_of(bench)
        assert order[:3] == ["warm", "urgent", "relaxed"]
        assert bench.ends["hopeless"].finish_reason is reason
        assert bench.scheduler.pool.num_available == bench.scheduler.pool.capacity


@pytest.mark.parametrize("policy", [*sorted(POLICIES), "vtc:predict=predicted", "vtc:predict=oracle"])
@pytest.mark.parametrize("overlap", [False, True])
def test_every_policy_works_with_chunks_prefixes_preemption_and_adapters(policy: str, overlap: bool) -> None:
    bench = Bench(num_blocks=20, policy=policy, overlap=overlap, reserve=0.0, max_sum_of_ranks=24)
    for index in range(24):
        prompt = [1, 2, 3, 4, 5, 6, 7, 8][: 1 + index % 8] + [index] * (index % 5) + [9] * (20 if index % 7 == 0 else 0)
        adapter = (None, *ADAPTERS)[index % 5]
        bench.add(f"r{index}", prompt, adapter, f"t{index % 3}", max_tokens=15, priority=index % 2, true_output_len=15)
        if index % 3 == 0:
            bench.step()
    bench.run().check_all()
    works = [work for batch in bench.runner.batches for work in batch.works]
    assert bench.scheduler.num_preemptions > 0
    assert any(output.num_cached for output in bench.firsts.values()), "a prefix was shared"
    assert any(work.num_tokens > 1 and 0 < work.start < work.request.num_prompt for work in works), "a later chunk"
    assert any(batch.works[0].is_decode and batch.works[-1].num_tokens > 1 for batch in bench.runner.batches)
    assert max(len({work.request.adapter for work in batch.works}) for batch in bench.runner.batches) > 1


def test_switching_among_all_policies_drops_nobody() -> None:
    bench = Bench(num_blocks=20)
    for index in range(30):
        bench.add(f"r{index}", [index, 1, 2], (None, *ADAPTERS)[index % 5], f"t{index % 4}", max_tokens=10)
    names = [*POLICIES] * 2
    while bench.engine.has_work:
        if names:
            bench.engine.set_scheduler({"policy": names.pop()})
        bench.step()
    bench.check_all()
    reasons = Counter(output.finish_reason for output in bench.ends.values())
    assert set(reasons) <= {FinishReason.STOP, FinishReason.LENGTH}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fifo", "unknown policy 'fifo'; known: drr, fcfs"),
        ("vtc:predict=psychic", "none, predicted or oracle"),
        ("vtc:predict=3", "must be a string"),
        ("inlaid:beta=-1", ">= 0"),
        ("inlaid:beta=0", "above 0"),
        ("inlaid:beta=1.5", "whole number"),
        ("inlaid:ageing=nan", ">= 0"),
        ("srtf:seniority=-1", ">= 0"),
        ("inlaid:gamma=1", "no option 'gamma'"),
        ("drr:quantum=0", "above 0"),
        ("srtf:ageing", "key=value"),
        ("slo:late=never", "last or refuse"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_with_its_reason(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


def test_options_come_as_they_are_written() -> None:
    assert parse_policy("inlaid:beta=5,ageing=2") == make_policy("inlaid", {"beta": 5, "ageing": 2.0})
