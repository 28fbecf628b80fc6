"""Planners: bounds as the seed's keys mean them, and misses of an objective."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.cluster.planner import BoundsPlanner, Load, Router, SloPlanner, Split, SplitPlanner, interval
from inlaid.cluster.view import ReplicaView

ROUTER = Router(max_prefill_num=13, max_decode_num=13, tokens_prefilled_per_sec=1000.0, num_available_blocks=100)


@given(st.integers(1, 13), st.integers(0, 10**5), st.integers(0, 2000))
def test_bounds_keep_within_the_numbers_and_move_towards_the_interval(count: int, tokens: int, blocks: int) -> None:
    planner = BoundsPlanner(ROUTER)
    wanted = planner.wanted(Load(count, tokens, blocks), (), 0.0)
    assert 1 <= wanted <= 13
    fewest = max(interval(tokens / 1000, 0.5, 0.8)[0], interval(blocks / 100, 0.75, 0.95)[0])
    assert wanted >= min(count, fewest, 13)
    if count < fewest:
        assert wanted >= min(fewest, 13)


def test_going_down_waits_for_the_threshold_and_takes_one_at_a_time() -> None:
    planner = BoundsPlanner(ROUTER)
    idle = Load(5, 0, 0)
    assert planner.wanted(idle, (), 10.0) == 5
    assert planner.wanted(idle, (), 10.3) == 5
    assert planner.wanted(idle, (), 10.34) == 4
    assert planner.wanted(Load(4, 0, 0), (), 10.4) == 4
    assert planner.wanted(Load(4, 3000, 0), (), 10.5) == 4  # 3 s of prompts: 4 to 6 replicas
    assert planner.wanted(Load(4, 4000, 0), (), 10.6) == 7  # 4 s: 5 to 8, and the middle of it


def test_apart_a_transfer_backlog_grows_both_roles_and_each_goes_down_by_itself() -> None:
    planner = SplitPlanner(ROUTER)
    assert planner.wanted(Load(1, 0, 0), Split(1, 1), 0.0) == Split(1, 1)
    moving = planner.wanted(Load(1, 0, 0, resident_tokens=60_000), Split(1, 1), 1.0)
    assert moving == Split(4, 4)  # a second of transfer: 3 to 5 replicas
    assert planner.wanted(Load(4, 2500, 0), Split(4, 4), 2.0) == Split(4, 4)
    assert planner.wanted(Load(4, 2500, 0), Split(4, 4), 2.4) == Split(4, 3)


def test_bounds_that_cross_are_refused() -> None:
    with pytest.raises(ValueError, match="prefill_lower_bound"):
        Router(prefill_lower_bound=0.9)
    with pytest.raises(ValueError, match="min_decode_num"):
        Router(min_decode_num=2)


def test_the_objective_follows_the_rate_and_holds_what_was_needed() -> None:
    planner = SloPlanner(1, 8, ttft=1.0, tpot=0.1, hold=5.0)

    def wanted(at: float, rates: list[tuple[float, float]], waiting: int = 0) -> int:
        """Return what is wanted when requests of 1,000 tokens have come at these rates from these times on."""
        came = sum(
            rate * max(0.0, min(at, end) - begin) for (begin, rate), (end, _) in zip(rates, [*rates[1:], (99, 0)])
        )
        return planner.wanted(Load(1, waiting, 0, requests=round(came), prompt_tokens=1000 * round(came)), (), at)

    steps = [(0.0, 5.0), (20.0, 60.0), (40.0, 5.0)]
    at = {second / 4: wanted(second / 4, steps) for second in range(240)}
    assert {at[second] for second in (5.0, 10.0, 19.0)} == {1}
    assert at[25.0] >= 2, "60 prompts of 22 ms each are more than one replica's time"
    assert at[20.0] == 1
    assert at[23.25] == at[25.0], "within the shorter window"
    assert at[43.0] == at[25.0], "held"
    assert at[59.0] == 1
    assert wanted(60.0, steps, waiting=200_000) > 1, "prompts that wait already count too"


def test_the_objective_counts_steps_and_seats() -> None:
    def wanted(answer: float, tpot: float) -> int:
        planner = SloPlanner(1, 8, tpot=tpot)
        planner.wanted(Load(1, 0, 0), (), 0.0)
        return planner.wanted(Load(1, 0, 0, requests=50, prompt_tokens=50_000, answer=answer), (), 5.0)

    assert wanted(10.0, 0.1) == 1
    assert wanted(1500.0, 0.1) > wanted(10.0, 0.1)
    assert wanted(500.0, 0.01) > wanted(500.0, 0.1)
    full = ReplicaView("a", 4, 8, num_running=4)
    assert SloPlanner(1, 8).wanted(Load(1, 0, 0), [full], 0.0) == 1
    full.num_running = 9
    assert SloPlanner(1, 8).wanted(Load(1, 0, 0), [full], 0.0) == 3
