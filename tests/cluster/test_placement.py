"""Placement: bookkeeping of views, rendezvous sets, when a request leaves its set, and Ray's rule."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.cluster.placement import PLACEMENTS, Multiplexed, Predicted, in_order, make_placement
from inlaid.cluster.view import PREFIX_CHUNK, Ask, Prices, ReplicaView, prefix_keys
from tests.examples import examples

PRICES = Prices()


def views(count: int = 4, seats: int = 8, slots: int = 4) -> list[ReplicaView]:
    return [ReplicaView(f"replica-{number}", seats, slots) for number in range(count)]


def ask(number: int, adapter: str | None = "a", prompt: int = 100, rank: int = 16) -> Ask:
    return Ask(str(number), adapter, rank, prompt, 50.0)


@examples(50)
@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["send", "begin", "end"]), st.sampled_from("abc"))))
def test_a_view_is_its_open_requests_and_nothing_else(events: list[tuple[int, str, str]]) -> None:
    view, open_asks, begun = views(1)[0], dict[str, Ask](), set[str]()
    for number, event, adapter in events:
        name = str(number)
        if event == "send" and name not in open_asks:
            open_asks[name] = Ask(name, adapter, ord(adapter), 10 + number, 5.0)
            view.send(open_asks[name])
        elif event == "begin":
            view.begin(name)
            begun |= {name} & open_asks.keys()
        elif event == "end":
            view.end(name)
            open_asks.pop(name, None)
            begun.discard(name)
    waiting = [each for name, each in open_asks.items() if name not in begun]
    assert (view.size, view.num_waiting, view.num_running) == (len(open_asks), len(waiting), len(begun))
    assert view.waiting_tokens == sum(each.prompt for each in waiting)
    assert view.context == sum(each.prompt for each in open_asks.values())
    assert view.ranks == sum(ord(adapter) for adapter in {each.adapter for each in open_asks.values()} if adapter)
    assert view.expected == pytest.approx(5.0 * len(open_asks))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_names_a_replica_that_is_there(name: str) -> None:
    placement, there, rng = make_placement(name, PRICES, 3), views(), random.Random(1)
    for number in range(300):
        asked = ask(number, rng.choice(["a", "b", "c", None]))
        chosen = placement.choose(asked, there, number / 10)
        assert chosen in {None, *(view.name for view in there)}
        for view in there:
            if view.name == chosen:
                view.send(asked)
        if number > 20:
            for view in there:
                view.end(str(number - 20))


def test_a_replica_that_leaves_moves_only_its_own_adapters() -> None:
    there = views(8)
    first = {f"a{n}": in_order(f"a{n}", there)[0].name for n in range(400)}
    assert min(Counter(first.values()).values()) > 400 / 8 / 2
    left = [view for view in there if view.name != "replica-3"]
    for adapter, home in first.items():
        if home != "replica-3":
            assert in_order(adapter, left)[0].name == home


def test_a_quiet_adapter_keeps_to_one_replica_and_a_busy_one_spreads_and_comes_back() -> None:
    placement, there = Predicted(PRICES), views(4, seats=1000)

    def used(count: int, gap: float, start: float, prompt: int) -> set[str | None]:
        return {placement.choose(ask(n, "a", prompt), there, start + n * gap) for n in range(count)}

    assert len(used(20, 1.0, 0.0, 100)) == 1
    busy = [placement.choose(ask(n, "a", 8000), there, 100 + n * 0.05) for n in range(200)]
    assert placement._demand["a"].spread > 1
    assert None not in busy
    assert len(used(20, 5.0, 1000.0, 100)) == 1
    assert placement._demand["a"].spread == 1


def test_a_new_replica_is_told_the_adapters_that_will_be_asked_for_there() -> None:
    placement, there = Predicted(PRICES), views(2)
    for number in range(60):
        placement.choose(ask(number, f"a{number % 20}"), there, number / 10)
    new = ReplicaView("replica-9", 8, 4)
    hot = placement.hot(new, [*there, new], 100)
    assert set(hot) == {f"a{n}" for n in range(20) if in_order(f"a{n}", [*there, new])[0] is new}
    assert 0 < len(hot) < 20
    assert placement.hot(new, [*there, new], 2) == hot[:2]


def test_a_request_leaves_its_set_only_for_more_than_the_load_costs() -> None:
    placement, there = Predicted(PRICES, patience=0.0), views(2, seats=1000)
    home, other = in_order("a", there)
    home.resident = {"a"}
    cost = placement.spill * PRICES.load_seconds(64)
    tokens = round(cost / PRICES.prefill_token)
    home.send(Ask("x", "a", 64, tokens // 2, 1.0))
    assert placement.choose(ask(1, "a", 10, 64), there, 0.0) == home.name
    home.send(Ask("y", "a", 64, 3 * tokens, 1.0))
    assert placement.choose(ask(2, "a", 10, 64), there, 0.0) == other.name


def test_a_known_prefix_and_a_silent_replica_count() -> None:
    placement, (one, other) = Predicted(PRICES), views(2)
    keys = prefix_keys([1] * 5 * PREFIX_CHUNK, "a")
    assert len(keys) == 5
    long = Ask("1", None, 0, 5 * PREFIX_CHUNK, 1.0, keys)
    other.send(long)
    other.end("1")
    assert other.cached(long) == 5 * PREFIX_CHUNK - 1
    assert placement.choose(long, [one, other], 0.0) == other.name
    other.silent = 1.0
    assert placement.choose(long, [one, other], 0.0) == one.name
    assert prefix_keys([1] * PREFIX_CHUNK, "a") != prefix_keys([1] * PREFIX_CHUNK, "b")


def test_rays_rule_pins_a_model_to_its_holder_until_that_is_full() -> None:
    placement, there = Multiplexed(PRICES), views(3, seats=2)
    there[1].resident = {"a"}
    for number in range(2):
        assert placement.choose(ask(number), there, 0.0) == "replica-1"
        there[1].send(ask(number))
    assert placement.choose(ask(9), there, 0.0) is None  # the holder is full
    assert placement.choose(ask(9), there, 0.1) in ("replica-0", "replica-2")  # then the fewest models
