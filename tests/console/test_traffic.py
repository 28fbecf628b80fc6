"""Counts and latencies of answers: what goes in comes out, and everything has a bound."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.console.traffic import UNUSED, Traffic, Window
from inlaid.engine.request import NewRequest


def request(adapter: str | None, deadline: float | None = None) -> NewRequest:
    return NewRequest(id="r", prompt=[1, 2, 3], adapter=adapter, tenant="t", deadline=deadline)


@given(st.lists(st.floats(2e-4, 1e3), min_size=1, max_size=300), st.floats(0.01, 1.0))
def test_a_percentile_is_right_to_a_bucket(values: list[float], share: float) -> None:
    window = Window(2)
    for value in values:
        window.add(value)
    (found,) = window.percentiles((share,))
    ordered = sorted(values)
    exact = ordered[next(at for at in range(len(ordered)) if at + 1 >= share * len(ordered))]
    assert found == pytest.approx(exact, rel=0.05)


def test_a_window_forgets_its_oldest_slot() -> None:
    window = Window(2)
    window.add(9.0)
    window.roll()
    window.add(0.01)
    assert window.percentiles((1.0,))[0] == pytest.approx(9.0, rel=0.05)
    assert window.percentiles((1.0,), last=1)[0] == pytest.approx(0.01, rel=0.05)
    window.roll()
    assert window.percentiles((1.0,))[0] == pytest.approx(0.01, rel=0.05)
    window.roll()
    assert window.percentiles() == [None, None]


def test_an_answer_is_counted_from_its_arrival_to_its_end() -> None:
    now = [1000.0]
    traffic = Traffic(wall=lambda: now[0])
    flight = traffic.begin(request("a", deadline=5.0), arrival=1.0)
    one = traffic.of("a")
    assert one.row()[:4] == (1, 0, 1, 0)
    assert len(one.row()) == len(UNUSED)
    flight.first(0.2, 1)
    flight.between(0.01, 2)
    assert one.row()[:4] == (0, 1, 1, 3)
    flight.end("length", 3, 4.0)
    queued, running, requests, tokens, last_used, attainment, ttft, *_ = one.row()
    assert (queued, running, requests, tokens, last_used, attainment) == (0, 0, 1, 3, 1000, 1.0)
    assert ttft == pytest.approx(0.2, rel=0.05)
    (served,) = traffic.last(10.0, 5.0)
    assert (served.arrival, served.adapter, served.num_prompt, served.num_outputs) == (1.0, "a", 3, 3)
    now[0] += 61
    traffic.roll()
    assert one.history[0][0] == 1061


def test_what_was_refused_or_left_is_not_replayed() -> None:
    traffic = Traffic()
    traffic.begin(request("a"), 1.0).end(None, 0, 2.0)
    left = traffic.begin(request("a"), 1.0)
    left.first(0.1, 1)
    left.end("abort", 1, 2.0)
    assert traffic.last(10.0, 2.0) == []
    assert traffic.of("a").row()[:2] == (0, 0)


def test_the_adapters_are_bounded_and_busy_ones_stay() -> None:
    draw, now = random.Random(0), [0.0]
    traffic = Traffic(max_adapters=20, wall=lambda: now[0])
    busy = traffic.begin(request("busy"), 0.0)
    for number in range(500):
        now[0] += 1.0
        traffic.begin(request(f"a{draw.randint(0, 100)}-{number}"), now[0]).end("stop", 1, now[0])
    assert len(traffic.by_adapter) == 20
    busy.first(0.1, 1)
    assert traffic.of("busy").running == 1
    traffic.forget(())
    assert set(traffic.by_adapter) == {"busy"}
