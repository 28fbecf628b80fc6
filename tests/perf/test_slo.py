"""Attainment: what fails counts as a miss, classes have their own limits."""

from __future__ import annotations

import pytest

from inlaid.workload.spec import Objective
from perf.records import Record, Status
from perf.slo import attainment, attainment_by_class, meets


def record(ttft: float, tpot: float, status: Status = "ok", service_class: str = "default") -> Record:
    """Eleven tokens; times in seconds."""
    return Record(0, "a", "a", service_class, 0, 0, ttft + 10 * tpot, status, 5, 11, 11, ttft, [tpot] * 10, 200)


def test_every_limit_must_hold() -> None:
    objective = Objective(ttft_ms=100, tpot_ms=20, e2el_ms=250)
    assert meets(record(0.1, 0.01), objective)
    assert not meets(record(0.11, 0.01), objective)
    assert not meets(record(0.01, 0.021), objective)
    assert not meets(record(0.09, 0.019), objective)


def test_failures_and_refusals_are_misses() -> None:
    objectives = {"default": Objective(ttft_ms=1000)}
    records = [record(0.1, 0.01), record(0.1, 0.01, "refused"), record(0.1, 0.01, "cut"), record(2, 0.01)]
    found = attainment(records, objectives)
    assert (found.requests, found.met, found.attainment, found.ttft) == (4, 1, 0.25, 0.25)
    assert found.tpot is None


def test_classes_are_judged_by_their_own_limits() -> None:
    objectives = {"fast": Objective(ttft_ms=100), "slow": Objective(e2el_ms=5000)}
    records = [record(0.5, 0.01, service_class=name) for name in ("fast", "slow", "slow")]
    by_class = attainment_by_class(records, objectives)
    assert (by_class["fast"].attainment, by_class["slow"].attainment) == (0.0, 1.0)
    assert attainment(records, objectives).attainment == pytest.approx(2 / 3)


def test_a_single_token_has_no_time_per_token_to_miss() -> None:
    single = Record(0, "a", "a", "default", 0, 0, 0.1, "ok", 5, 1, 1, 0.1, [], 200)
    assert meets(single, Objective(tpot_ms=1))


def test_no_requests_have_no_attainment() -> None:
    assert attainment([], {}).attainment == 0.0
