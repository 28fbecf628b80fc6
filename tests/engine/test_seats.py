"""Seats: no tenant keeps all places of a step while others wait, and none stays empty."""

from __future__ import annotations

from collections import Counter

import pytest

from inlaid.engine.policy import POLICIES
from inlaid.engine.request import FinishReason
from tests.engine.bench import Bench
from tests.engine.fake_runner import FakeAdapters


def fill(bench: Bench, tenant: str, count: int, adapter: str | None = None, max_tokens: int = 60) -> None:
    for _ in range(count):
        number = len(bench.wanted)
        prompt = [number % 50]
        bench.add(f"{tenant}{number}", prompt, adapter, tenant, max_tokens=max_tokens, ignore_eos=True)


def seats(bench: Bench) -> Counter[str]:
    return Counter(progress.request.tenant for progress in bench.scheduler.state.running.values())


def flooded(overlap: bool = False, policy: str = "fcfs", **config: object) -> Bench:
    """Return eight seats, all held by tenant a, whose answers are long; a has as many requests waiting."""
    bench = Bench(num_blocks=400, overlap=overlap, policy=policy, max_num_seqs=8, **config)
    fill(bench, "a", 16)
    for _ in range(3):
        bench.step()
    assert seats(bench) == {"a": 8}
    return bench


@pytest.mark.parametrize(
    ("policy", "overlap"), [(policy, place % 2 == 1) for place, policy in enumerate(sorted(POLICIES))]
)
def test_a_tenant_that_finds_all_seats_taken_gets_its_share_in_as_many_steps(policy: str, overlap: bool) -> None:
    bench = flooded(overlap, "rpm:limit=99" if policy == "rpm" else policy)
    fill(bench, "b", 8)
    bench.step()
    assert seats(bench)["b"] >= 1
    for _ in range(4):
        bench.step()
    assert seats(bench) == {"a": 4, "b": 4}
    bench.run().check_all()
    assert {output.finish_reason for output in bench.ends.values()} == {FinishReason.LENGTH}


def test_with_a_limit_of_all_seats_it_waits_for_an_answer_to_end() -> None:
    bench = flooded(max_seqs_per_tenant=8)
    fill(bench, "b", 8)
    for _ in range(50):
        bench.step()
    assert seats(bench) == {"a": 8}


def test_seats_that_no_other_tenant_wants_are_not_left_empty() -> None:
    bench = flooded()
    fill(bench, "b", 1)
    for _ in range(4):
        bench.step()
    assert seats(bench) == {"a": 7, "b": 1}
    assert bench.scheduler.num_preemptions == 1


def test_shares_go_by_weight() -> None:
    bench = Bench(num_blocks=400, policy="vtc", max_num_seqs=8)
    bench.engine.set_scheduler({"weights": {"a": 3.0}})
    fill(bench, "b", 16)
    for _ in range(3):
        bench.step()
    fill(bench, "a", 16)
    for _ in range(12):
        bench.step()
    assert seats(bench) == {"a": 6, "b": 2}


def test_a_limit_that_was_set_holds_while_others_wait() -> None:
    bench = Bench(num_blocks=400, max_num_seqs=8, max_seqs_per_tenant=2)
    fill(bench, "a", 4)
    fill(bench, "b", 4)
    bench.step()
    assert seats(bench) == {"a": 4, "b": 4}, "nobody else is left who could use the rest"
    fill(bench, "c", 1)
    for _ in range(2):
        bench.step()
    assert seats(bench)["c"] == 1


def test_no_seat_is_taken_for_a_request_whose_adapter_is_loading() -> None:
    bench = flooded(adapters=FakeAdapters(("slow",), load=6))
    fill(bench, "b", 1, adapter="slow")
    for _ in range(4):
        bench.step()
    assert seats(bench) == {"a": 8}
    assert bench.scheduler.num_preemptions == 0
    for _ in range(4):
        bench.step()
    assert seats(bench) == {"a": 7, "b": 1}


def test_short_requests_of_one_tenant_cost_another_one_preemption_each() -> None:
    bench = flooded()
    for _ in range(6):
        fill(bench, "b", 1, max_tokens=2)
        for _ in range(4):
            bench.step()
    assert bench.scheduler.num_preemptions <= 6
    bench.run().check_all()


@pytest.mark.parametrize("overlap", [False, True])
def test_under_vtc_a_tenant_falls_behind_by_no_more_than_the_bound(overlap: bool) -> None:
    """w_q s (S - s) is 2 x 4 x 4 here; beside it there are prompts of one token and a step's delay."""
    bench = flooded(overlap, "vtc")
    fill(bench, "b", 16)
    accounts = bench.scheduler.ledger.accounts
    before = accounts["a"].service - accounts["b"].service
    largest = 0.0
    while accounts["a"].num_waiting and accounts["b"].num_waiting:
        bench.step()
        largest = max(largest, accounts["a"].service - accounts["b"].service - before)
    assert largest <= 2 * 4 * 4 + 8 + 2 * 8
    bench.run().check_all()
