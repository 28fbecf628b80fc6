"""Planners: bounds as the seed's keys mean them, and misses of an objective."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.cluster.planner import BoundsPlanner, Load, Router, SloPlanner, Split, interval, split_wanted
from inlaid.cluster.view import Ask, ReplicaView

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


def test_apart_a_transfer_backlog_grows_both_roles() -> None:
    calm = split_wanted(ROUTER, Load(2, 0, 0), Split(1, 1))
    assert calm == Split(1, 1)
    moving = split_wanted(ROUTER, Load(2, 0, 0, resident_tokens=60_000), Split(1, 1))
    assert moving.prefill > 1
    assert moving.decode > 1


def test_bounds_that_cross_are_refused() -> None:
    with pytest.raises(ValueError, match="prefill_lower_bound"):
        Router(prefill_lower_bound=0.9)
    with pytest.raises(ValueError, match="min_decode_num"):
        Router(min_decode_num=2)


def test_the_objective_adds_where_a_request_would_be_late_and_drains_what_is_not_needed() -> None:
    planner = SloPlanner(1, 4, ttft=0.5, hold=5.0)
    view = ReplicaView("a", 64, 8, is_open=True)
    for number in range(4):
        view.send(Ask(str(number), None, 0, 10_000, 100.0))
    assert planner.wanted(Load(1, view.waiting_tokens, 0), [view], 0.0) == 2
    for number in range(4):
        view.end(str(number))
    other = ReplicaView("b", 64, 8)
    assert planner.wanted(Load(2, 0, 0), [view, other], 1.0) == 2
    assert planner.wanted(Load(2, 0, 0), [view, other], 5.9) == 2
    assert planner.wanted(Load(2, 0, 0), [view, other], 6.1) == 1
    assert planner.wanted(Load(1, 0, 0), [view], 20.0) == 1
