"""Rank-aware placement: the published worked case, the edge cases it leaves open, and the order of the ways."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from inlaid.sim import placement_sweep
from inlaid.sim.cost import load_cost
from inlaid.sim.placement import (
    DLORA,
    EXACT,
    PADDED,
    Call,
    Kernel,
    Replica,
    choosers,
    functions_trace,
    rank_aware,
    run,
)
from inlaid.workload.functions import synthetic

FUNCTIONS = synthetic(4000)


def loaded(kernel: Kernel, count: int, rank: int) -> Replica:
    replica = Replica(kernel)
    for number in range(count):
        replica.push(Call(0.0, number, rank, 50))
    return replica


def test_the_worked_case_goes_where_the_kernel_makes_it_cheap() -> None:
    """24 rows of rank 32 against 16 of rank 64; one of rank 64 arrives; 36 ms is the objective."""
    call = Call(0.0, 999, 64, 50)
    for kernel, wanted, steps in ((PADDED, 1, (35.8, 34.8)), (EXACT, 0, (35.3, 35.9))):
        replicas = [loaded(kernel, 24, 32), loaded(kernel, 16, 64)]
        after = tuple(round(1e3 * kernel.after(replica.all, 64), 1) for replica in replicas)
        assert after == steps
        assert min((0, 1), key=lambda place: after[place]) == wanted
    assert rank_aware(0.036, 60.0)([loaded(PADDED, 24, 32), loaded(PADDED, 16, 64)], call, random.Random(0)) == 1


def test_an_empty_replica_neither_always_wins_nor_breaks_the_sum() -> None:
    choose = rank_aware(slo=0.001, mean_tokens=60.0)  # nothing can meet it
    replicas = [loaded(EXACT, 5, 8), loaded(EXACT, 0, 8)]
    assert choose(replicas, Call(0.0, 1, 64, 10), random.Random(0)) == 1


def test_every_request_is_served_whole_and_in_its_place() -> None:
    calls = functions_trace(50.0, 5.0, 3, FUNCTIONS)
    for choose in choosers(0.04, 60.0).values():
        served = run(calls, choose, EXACT, 8)
        assert len(served) == len(calls)
        for call in served:
            assert call.left == 0
            assert call.finish - call.arrival >= (call.tokens - 1) * EXACT.base


def test_alone_a_request_takes_a_prefill_and_its_decodes() -> None:
    (call,) = run([Call(1.0, 0, 16, 11)], choosers(0.04, 60.0)["most-idle"], EXACT, 3)
    step = EXACT.base + 16 * EXACT.per_rank
    assert abs(call.finish - 1.0 - (1.5 + 10) * step) < 1e-9


def test_rank_awareness_helps_kernels_that_pad_and_first_fit_is_worst() -> None:
    kernel = replace(PADDED, slo=0.045, replicas=20)
    rows = {row["placement"]: row for row in placement_sweep.compare(80.0, 1, kernel, FUNCTIONS, 15.0)}
    assert rows["rank-aware"]["mean_ms"] < rows["most-idle"]["mean_ms"] < rows["random"]["mean_ms"]
    assert rows["first-fit"]["slo_attainment"] < rows["random"]["slo_attainment"]
    shares = rows["most-idle"]["cdf_ms"]
    assert shares == sorted(shares)
    assert shares[0] <= rows["most-idle"]["mean_ms"] <= shares[-1]


def test_migration_takes_queued_calls_to_free_seats_and_pays_for_their_adapters() -> None:
    kernel = replace(EXACT, load_rank=1e-3)
    calls = [Call(0.001 * number, number % 3, 16, 40) for number in range(90)]

    def to_the_first(replicas: object, call: Call, rng: object) -> int:
        return 0

    stays, moves = (run(calls, to_the_first, kernel, 3, migrates=migrates) for migrates in (False, True))
    assert all(call.left == 0 and call.finish > call.arrival for call in moves)
    ends = [max(call.finish for call in served) for served in (stays, moves)]
    assert ends[1] < 0.6 * ends[0]
    even = run(calls, choosers(0.04, 60.0)["most-idle"], kernel, 3)
    assert ends[1] > max(call.finish for call in even), "the calls were queued before they moved"


def test_our_kernels_are_a_machines_and_agree_with_the_engines_replicas() -> None:
    cost = load_cost("h200")
    kernel = placement_sweep.ours(cost)
    assert kernel.decode([8, 64]) == pytest.approx(kernel.base + 2 * kernel.per_row + 72 * cost.ranks)
    rows = placement_sweep.check("h200", 120.0, 1, FUNCTIONS, seconds=2.0)
    assert {row["placement"] for row in rows} == {"random", "most-idle", "rank-aware"}
    for row in rows:
        assert row["mean_ms"] == pytest.approx(row["engine_mean_ms"], rel=0.03), row
    assert DLORA in choosers(0.04, 60.0)
