"""The rule of eviction: worth decides, protection holds, and the simulator runs the very same rule."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inlaid.adapters.eviction import GRACE, Claim, Eviction, in_order, reload_cost
from inlaid.sim import adapters as sim
from inlaid.sim.cost import CostModel


def used(eviction: Eviction, claim: Claim, times: int, cost: float = 1.0) -> None:
    """Let so many requests use an adapter."""
    for _ in range(times):
        claim.popularity += 1
        claim.was_used = True
        eviction.touch(claim, cost)


def test_the_least_valuable_leaves_first_and_of_equals_the_least_recently_used() -> None:
    eviction, first, second, popular, costly = Eviction(), Claim(), Claim(), Claim(), Claim()
    used(eviction, popular, 3)
    used(eviction, first, 1)
    used(eviction, second, 1)
    used(eviction, costly, 1, cost=2.0)
    assert in_order([popular, costly, second, first]) == [first, second, costly, popular]


def test_popularity_of_long_ago_does_not_keep_an_adapter_for_ever() -> None:
    eviction, old = Eviction(), Claim()
    used(eviction, old, 10)
    for _ in range(11):
        new = Claim()
        used(eviction, new, 1)
        eviction.evict(new)
    last = Claim()
    used(eviction, last, 1)
    assert in_order([last, old]) == [old, last]


def test_an_adapter_that_must_come_from_disk_is_worth_more() -> None:
    assert reload_cost(1 << 20, on_host=False) > 2 * reload_cost(1 << 20, on_host=True)
    assert reload_cost(1 << 10, on_host=True) > reload_cost(1 << 20, on_host=True)


@given(st.lists(st.sampled_from(["want", "pin", "unpin", "resolve", "release", "arrive"]), max_size=60), st.booleans())
def test_what_is_pinned_stays_and_what_was_loaded_for_a_request_has_its_time(events: list[str], coming: bool) -> None:
    eviction, claim = Eviction(), Claim()
    for event in events:
        if event == "want":
            eviction.touch(claim, 1.0)
        elif event == "arrive":
            eviction.arrive(claim)
        elif event in ("pin", "resolve"):
            claim.pins += event == "pin"
            claim.was_used |= event == "pin"
            claim.references += event == "resolve"
        else:
            claim.pins = max(0, claim.pins - (event == "unpin"))
            claim.references = max(0, claim.references - (event == "release"))
        may_leave = eviction.may_leave(claim, coming)
        assert not (may_leave and claim.pins)
        assert may_leave or claim.pins or (claim.references and not claim.was_used)
    for _ in range(GRACE + 1):
        eviction.touch(claim, 1.0)
    if not claim.pins and not coming:
        assert eviction.may_leave(claim, coming)


def test_the_simulator_evicts_by_value_and_not_by_recency() -> None:
    """Two places, the popular adapter used three times and then the other once: recency would drop the popular one."""
    now = [0.0]
    cost = CostModel(name="flat", source="test", load_base=0.1)
    adapters = sim.SimAdapters(cost, lambda: now[0], slots=2, ranks={})
    for name in ("popular", "popular", "popular", "other"):
        adapters.resolve(name)
        adapters.want(name)
        now[0] += 1.0
        adapters.pin(name)
        adapters.unpin(name)
        adapters.release(name)
    adapters.resolve("new")
    adapters.want("new")
    now[0] += 1.0
    assert (adapters.ready("popular"), adapters.ready("other"), adapters.ready("new")) == (True, False, True)
