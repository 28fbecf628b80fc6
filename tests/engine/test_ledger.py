"""Every token is charged once, to the right tenant, at the stated price; and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.engine.cost import LinearCost, ProfiledCost
from inlaid.engine.ledger import MAX_WEIGHT, MIN_WEIGHT, Ledger
from inlaid.engine.predictor import Oracle
from inlaid.engine.request import FinishReason
from tests.engine.bench import Bench
from tests.engine.fake_runner import FakeAdapters
from tests.examples import examples


@examples(60)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.lists(st.integers(0, 1), min_size=1, max_size=20),
            st.integers(1, 15),
            st.one_of(st.none(), st.integers(0, 20)),
        ),
        min_size=1,
        max_size=10,
    ),
    policy=st.sampled_from(["fcfs", "vtc", "vtc:predict=predicted", "drr", "inlaid"]),
    cost=st.sampled_from(["linear", "profiled"]),
    price=st.sampled_from([0.0, 0.25, 1.0]),
    overlap=st.booleans(),
    num_blocks=st.integers(12, 30),
)
def test_the_sum_over_tenants_is_the_sum_over_steps(
    requests: Any, policy: str, cost: str, price: float, overlap: bool, num_blocks: int
) -> None:
    bench = Bench(num_blocks=num_blocks, overlap=overlap, policy=policy, cost=cost, cached_price=price, reserve=0.0)
    ledger = bench.scheduler.ledger
    for index, (tenant, prompt, count, _) in enumerate(requests):
        bench.add(f"r{index}", prompt, tenant=f"t{tenant}", max_tokens=count, ignore_eos=True)
    by_step, delivered, before, step = 0.0, 0, 0.0, 0
    while bench.engine.has_work:
        for index, (*_, aborted) in enumerate(requests):
            if aborted == step:
                bench.engine.abort(f"r{index}")
        delivered += sum(len(output.tokens) for output in bench.step())
        by_step += ledger.total - before
        before = ledger.total
        step += 1
        assert ledger.total >= by_step - 1e-6
    accounts = ledger.accounts.values()
    assert sum(a.service for a in accounts) == pytest.approx(ledger.total)
    assert by_step == pytest.approx(ledger.total)
    assert sum(a.output_tokens for a in accounts) == delivered == ledger.num_output_tokens
    # Whatever was charged ahead is given back: at the end the counters hold the service and the lifts alone.
    if policy.startswith("vtc") and len(ledger.accounts) == 1:
        (account,) = accounts
        assert account.counter == pytest.approx(account.service)


def test_a_request_costs_its_tokens_however_it_was_chunked_preempted_or_cached() -> None:
    bench = Bench(num_blocks=12, policy="vtc", max_num_batched_tokens=5, reserve=0.0, admission_margin=0.0)
    for index in range(4):
        bench.add(f"r{index}", [index] * 9, tenant=f"t{index}", max_tokens=12, ignore_eos=True)
    bench.run().check_all()
    assert bench.scheduler.num_preemptions > 0
    for account in bench.scheduler.ledger.accounts.values():
        assert account.prompt_tokens + account.cached_tokens == 9
        assert account.output_tokens == 12
        assert account.service == 9 + 2 * 12


def test_cached_prompt_tokens_cost_their_stated_share() -> None:
    bench = Bench(cached_price=0.25)
    for tenant in ("first", "second"):
        bench.add(tenant, [1] * 16, tenant=tenant, max_tokens=1, ignore_eos=True)
        bench.run()
    accounts = bench.scheduler.ledger.accounts
    assert accounts["first"].service == 16 + 2
    assert accounts["second"].cached_tokens == 12
    assert accounts["second"].service == 0.25 * 12 + 4 + 2


@pytest.mark.parametrize("cost", [LinearCost(), LinearCost(0.5, 3.0, 0.1), ProfiledCost()])
def test_prices_add_up(cost: Any) -> None:
    assert cost.prefill(0, 100) == pytest.approx(cost.prefill(0, 7) + cost.prefill(7, 60) + cost.prefill(60, 100))
    assert cost.output(50, 1, 90) == pytest.approx(sum(cost.output(50, n, n) for n in range(1, 91)))


def test_the_profiled_price_is_the_published_function() -> None:
    cost = ProfiledCost()
    x, y = 256, 128
    h = 0.21001891 * x + 0.10075395 * y + 0.0039868 * x * y + 0.00324733 * y * y + 1.14601454
    assert cost.prefill(0, x) + cost.output(x, 1, y) == pytest.approx(h)


def test_a_tenant_back_from_idleness_is_lifted_to_who_waits_or_else_to_who_left_last() -> None:
    ledger = Ledger()
    old, young = ledger.account("old"), ledger.account("young")
    ledger.enter_queue(old)
    ledger.charge_prefill(old, 0, 500)
    ledger.enter_queue(young)
    assert young.counter == 500
    assert young.service == 0
    ledger.leave_queue(old)
    ledger.leave_queue(young)
    ledger.charge_prefill(young, 0, 100)
    ledger.enter_queue(old)  # nobody waits; young left last
    assert old.counter == 600


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_a_tenant_that_comes_back_is_lifted_to_what_others_were_delivered_not_to_what_they_pay_ahead(
    weight: float,
) -> None:
    bench = Bench(policy="vtc:predict=oracle", max_num_seqs=2)
    bench.scheduler.ledger.set_weights({"busy": weight})
    for index in range(4):
        bench.add(f"b{index}", [1, 2, 3], tenant="busy", max_tokens=20, ignore_eos=True, true_output_len=20)
    for _ in range(5):
        bench.step()
    bench.add("new", [1], tenant="new", max_tokens=20, ignore_eos=True, true_output_len=20)
    busy, new = (bench.scheduler.ledger.accounts[tenant] for tenant in ("busy", "new"))
    assert busy.counter == 2 * (3 + 2 * 20) / weight
    assert new.counter == busy.delivered == busy.service / weight < busy.counter
    bench.run().check_all()


def test_a_lift_never_lowers_and_a_preempted_tenant_is_not_lifted() -> None:
    ledger = Ledger()
    rich, poor = ledger.account("rich"), ledger.account("poor")
    ledger.charge_prefill(rich, 0, 500)
    ledger.enter_queue(poor)
    ledger.enter_queue(rich)
    assert rich.counter == 500
    other = ledger.account("other")
    ledger.leave_queue(poor)
    ledger.enter_queue(other, lift=False)
    assert other.counter == 0


def test_weights_divide_the_counter_and_bad_ones_change_nothing() -> None:
    ledger = Ledger()
    ledger.set_weights({"gold": 4.0})
    gold = ledger.account("gold")
    ledger.charge_prefill(gold, 0, 100)
    assert (gold.service, gold.counter) == (100, 25)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            ledger.set_weights({"gold": 2.0, "bad": weight})
    assert ledger.weights == {"gold": 4.0}


def test_new_weights_leave_the_past_as_it_was_charged() -> None:
    bench = Bench(policy="vtc")
    bench.add("r", [1, 2, 3], tenant="t", max_tokens=20, ignore_eos=True)
    bench.step()
    bench.step()
    ledger = bench.scheduler.ledger
    account = ledger.account("t")
    assert account.counter == account.service == 3 + 2 * 2
    ledger.set_weights({"t": 4.0})
    assert (account.service, account.counter) == (7, 7)
    bench.step()
    assert (account.service, account.counter) == (9, 7.5)


@pytest.mark.parametrize("length", [20, None])
def test_a_failed_step_and_an_abort_give_back_what_was_charged_ahead(length: int | None) -> None:
    """The oracle is told the length, or knows it of a request that ignores the end token."""
    bench = Bench(policy="vtc:predict=oracle", adapters=FakeAdapters())
    bench.add("r", [1, 2, 3], tenant="t", max_tokens=20, ignore_eos=True, true_output_len=length)
    bench.step()
    account = bench.scheduler.ledger.accounts["t"]
    assert account.counter == 3 + 2 * 20
    assert account.service == account.delivered == 3 + 2
    bench.step()
    bench.engine.abort("r")
    bench.run()
    assert account.counter == account.service == account.delivered == 3 + 2 * 2


def test_the_window_holds_what_was_served_in_it() -> None:
    ledger = Ledger()
    account = ledger.account("t")
    for second in range(100):
        ledger.note(float(second))
        ledger.charge_prefill(account, 0, 10)
    assert ledger.served(99.0, 10.0)["t"] == pytest.approx(100, abs=10)
    assert ledger.served(99.0, 1000.0)["t"] == pytest.approx(1000)


def test_a_flood_of_tenants_is_forgotten_without_losing_a_token() -> None:
    ledger = Ledger(max_accounts=100)
    for number in range(1000):
        ledger.charge_prefill(ledger.account(f"t{number}"), 0, 7)
    assert len(ledger.accounts) <= 100
    assert ledger.forgotten + sum(a.service for a in ledger.accounts.values()) == ledger.total == 7000


def test_what_was_charged_is_not_charged_again_as_cached_after_a_preemption() -> None:
    bench = Bench(cached_price=0.5)
    bench.add("r", [3] * 9, tenant="t", max_tokens=6, ignore_eos=True)
    for _ in range(3):
        bench.step()
    bench.scheduler.preempt("r")
    bench.run().check_all()
    account = bench.scheduler.ledger.accounts["t"]
    assert (account.prompt_tokens, account.cached_tokens, account.service) == (9, 0, 9 + 2 * 6)


@pytest.mark.parametrize("weight", [MIN_WEIGHT, 1.0, MAX_WEIGHT])
@pytest.mark.parametrize("policy", ["vtc", "drr", "drr:quantum=0.001", "lcf"])
def test_the_extreme_weights_leave_an_order_after_a_trillion_tokens(policy: str, weight: float) -> None:
    bench = Bench(policy=policy, max_num_seqs=2)
    bench.scheduler.ledger.set_weights({"odd": weight})
    bench.scheduler.ledger.charge_prefill(bench.scheduler.ledger.account("odd"), 0, 10**12)
    bench.scheduler.ledger.charge_prefill(bench.scheduler.ledger.account("even"), 0, 10**12)
    for index in range(12):
        bench.add(f"r{index}", [index], tenant=("odd", "even")[index % 2], max_tokens=3, ignore_eos=True)
    bench.run(200).check_all()


def _served(end: Callable[[Bench], None], policy: str, cost: str, max_tokens: int) -> tuple[Ledger, list[float]]:
    bench = Bench(policy=policy, cost=cost, lengths=Oracle())
    bench.add("other", [9, 9], tenant="u", max_tokens=30, ignore_eos=True, true_output_len=30)
    bench.add("r", [1, 2, 3], tenant="t", max_tokens=max_tokens, ignore_eos=True, stop=("x",), true_output_len=8)
    end(bench)
    bench.run()
    account = bench.scheduler.ledger.account("t")
    return bench.scheduler.ledger, [account.service, account.counter, account.output_tokens, account.prompt_tokens]


@pytest.mark.parametrize("policy", ["fcfs", "vtc", "vtc:predict=oracle", "drr"])
@pytest.mark.parametrize("cost", ["linear", "profiled"])
@pytest.mark.parametrize("late", [0, 4, 12])
def test_charges_end_where_the_text_ends_whatever_the_timing(policy: str, cost: str, late: int) -> None:
    """A stop string after the fifth token, found `late` steps later (12: the answer has ended by itself meanwhile)."""

    def stop(bench: Bench) -> None:
        while len(bench.tokens["r"]) < 5:
            bench.step()
        for _ in range(late):
            bench.step()
        assert bench.engine.abort("r", FinishReason.STOP, num_tokens=5) == (late < 12)
        assert not bench.engine.abort("r", FinishReason.STOP, num_tokens=5), "nothing is taken back twice"

    ledger, stopped = _served(stop, policy, cost, max_tokens=16)
    _, exact = _served(lambda bench: None, policy, cost, max_tokens=5)
    assert stopped == pytest.approx(exact)
    assert ledger.total == pytest.approx(sum(account.service for account in ledger.accounts.values()))
    assert ledger.num_output_tokens == 30 + 5
    assert all(account.ahead == pytest.approx(0.0, abs=1e-9) for account in ledger.accounts.values())


def test_requests_in_which_no_stop_string_can_be_found_are_not_remembered() -> None:
    bench = Bench()
    for index in range(3):
        bench.add(f"r{index}", [1], max_tokens=2, ignore_eos=True)
    bench.run()
    bench.engine.abort("r0", FinishReason.STOP, num_tokens=1)
    assert bench.scheduler.ledger.num_output_tokens == 6
