"""Requests grow senior in order of arrival, once each, and those that are gone are not kept."""

from __future__ import annotations

from inlaid.engine.request import Status
from inlaid.engine.seniority import MIN_LOOKED_THROUGH, Seniority
from tests.engine.test_waiting import queued


def test_those_that_came_by_then_are_taken_oldest_first() -> None:
    late, early, later = (queued(number, "t", arrival) for number, arrival in enumerate((2.0, 1.0, 5.0)))
    seniority = Seniority([late, early, later])
    assert seniority.promote(0.5) == []
    assert seniority.promote(2.0) == [early, late]
    assert seniority.promote(4.9) == []
    assert seniority.promote(5.0) == [later]


def test_only_requests_that_wait_and_are_not_senior_are_taken_and_each_once() -> None:
    gone, senior, twice = (queued(number, "t", 1.0) for number in range(3))
    senior.senior = True
    seniority = Seniority([gone, senior, twice])
    gone.status = Status.RUNNING
    twice.arrival = 0.5  # a simulated request counts from before the step in which it was added
    seniority.watch(twice)
    assert seniority.promote(1.0) == [twice]
    assert twice.senior


def test_requests_that_left_are_not_kept_for_ever() -> None:
    keeper = queued(0, "t", -1.0)
    seniority = Seniority([keeper])
    for number in range(1, 5000):
        request = queued(number, "t", float(number))
        seniority.watch(request)
        request.status = Status.FINISHED
    assert len(seniority) <= 2 * MIN_LOOKED_THROUGH
    assert seniority.promote(0.0) == [keeper]
