"""Limits on entering the queue: per tenant and window, a fair share when it is full, and bounded memory in a flood."""

from __future__ import annotations

import pytest

from inlaid.engine.account import Account
from inlaid.engine.limits import MAX_REMEMBERED, Acceptances, QueueLimits, TenantLimits
from inlaid.engine.refusal import Refused


def account(tenant: str, waiting: int) -> Account:
    return Account(tenant, 0, num_waiting=waiting)


def test_a_full_queue_still_takes_those_below_an_equal_share() -> None:
    limits = QueueLimits(max_waiting=12)
    limits.check(account("alone", 11), 11, 1, 0.0)
    with pytest.raises(Refused):
        limits.check(account("alone", 12), 12, 1, 0.0)
    limits.check(account("new", 0), 12, 1, 0.0)
    limits.check(account("new", 5), 17, 2, 0.0)
    with pytest.raises(Refused):
        limits.check(account("new", 6), 18, 2, 0.0)


def test_a_crowd_of_tenants_with_one_request_each_cannot_grow_without_end() -> None:
    limits = QueueLimits(max_waiting=100)
    let_in = 0
    for number in range(10_000):
        try:
            limits.check(account(f"t{number}", 0), let_in, let_in, 0.0)
            let_in += 1
        except Refused:
            break
    assert let_in == 100


def test_the_window_slides_and_says_when() -> None:
    limits = QueueLimits(max_waiting=100)
    for now in (0.0, 5.0, 8.0):
        limits.check_rate("t", 3, 10.0, now)
        limits.note_accepted("t", now, 10.0)
    with pytest.raises(Refused) as caught:
        limits.check_rate("t", 3, 10.0, 9.0)
    assert caught.value.retry_after == pytest.approx(1.0)
    limits.check_rate("t", 3, 10.0, 10.5)
    with pytest.raises(Refused):
        limits.check_rate("nobody", 0, 10.0, 0.0)


def test_a_flood_of_tenants_is_forgotten_once_out_of_the_window() -> None:
    limits = QueueLimits(max_waiting=100)
    for number in range(3 * MAX_REMEMBERED):
        limits.note_accepted(f"t{number}", float(number), 60.0)
    assert len(limits.accepted.export(0.0)) <= MAX_REMEMBERED


def test_waits_are_predicted_from_the_pace_of_admissions() -> None:
    limits = QueueLimits(max_waiting=1)
    for number in range(200):
        limits.note_admitted(0.5 * number, others_wait=True)
    assert limits.expected_wait(10) == pytest.approx(5.0, rel=0.01)
    with pytest.raises(ValueError, match="0 or more"):
        limits.set_tenants({"t": TenantLimits(max_waiting=-1)})


def test_the_minute_of_a_tenant_leaves_the_longer_window_of_the_policy_whole() -> None:
    limits = QueueLimits(max_waiting=100)
    limits.note_accepted("t", 0.0, 600.0)
    limits.check_rate("t", 1, 60.0, 100.0)
    with pytest.raises(Refused):
        limits.check_rate("t", 1, 600.0, 100.0)


def test_acceptances_that_count_no_more_are_dropped_as_new_ones_come() -> None:
    limits = QueueLimits(max_waiting=100)
    limits.set_tenants({"counted": TenantLimits(requests_per_minute=5), "uncounted": TenantLimits(max_waiting=5)})
    for now in range(10_000):
        for tenant in ("counted", "uncounted", "unknown"):
            limits.note_accepted(tenant, float(now), None)
    assert {tenant: len(times) for tenant, times in limits.accepted.export(9_999.0).items()} == {"counted": 60}


def test_acceptances_move_to_another_process() -> None:
    first, second = Acceptances(), Acceptances()
    first.note("t", 0.0, 600.0)
    first.note("t", 500.0, 600.0)
    first.note("gone", 0.0, 600.0)
    second.restore(first.export(700.0), first.longest_window)
    assert second.wait("t", 1, 600.0, 700.0) == 400.0
    assert second.wait("t", 2, 600.0, 700.0) == 0.0
    assert second.wait("gone", 1, 600.0, 700.0) == 0.0
