"""Fairness figures from hand-made records whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.fairness import fairness, jain
from perf.records import Record


def steady(tenant: str, at: float, tokens: int, gap: float = 0.1, input_len: int = 10) -> Record:
    """Sent when due, first token after `gap`, then one every `gap`."""
    end = at + gap * tokens
    return Record(
        0, tenant, tenant, "default", at, at, end, "ok", input_len, tokens, tokens, gap, [gap] * (tokens - 1), 200
    )


def test_equal_tenants_are_perfectly_fair() -> None:
    records = [steady(tenant, float(at), 10) for at in range(20) for tenant in "ab"]
    found = fairness(records, {})
    assert (found.tenants, found.jain_service, found.jain_satisfied) == (2, 1.0, 1.0)
    assert found.gap_max == 0
    assert found.difference_max == pytest.approx(0, abs=1e-9)


def test_service_is_input_plus_twice_output() -> None:
    """b gets nothing, a gets 10 + 2 * 20 = 50 in all."""
    refused = Record(1, "b", "b", "default", 0.0, 0.0, 4.0, "refused", 10, 0, 20)
    later = Record(2, "b", "b", "default", 9.0, 9.0, 9.0, "refused", 10, 0, 20)
    found = fairness([steady("a", 0.0, 20), refused, later], {})
    assert found.gap_end == pytest.approx(50)
    assert found.jain_service == pytest.approx(0.5)


def test_weights_scale_what_is_fair() -> None:
    """a has weight 2 and gets twice as much: fair."""
    records = [steady("a", float(at), 10) for at in range(20)] + [steady("b", float(at), 10) for at in range(0, 20, 2)]
    assert fairness(records, {}).jain_service < 0.95
    assert fairness(records, {"a": 2.0}).jain_service == pytest.approx(1.0)


def test_unmet_demand_of_a_starved_tenant_is_a_difference() -> None:
    """a and b ask for 30 a second each, only a is served: the difference is b's 30 for as long as it lasts."""
    served = [steady("a", float(at), 10, gap=0.01) for at in range(100)]
    starved = [Record(0, "b", "b", "default", at + 0.0, at + 0.0, at + 1.0, "refused", 10, 0, 10) for at in range(100)]
    found = fairness(served + starved, {})
    assert found.difference_mean == pytest.approx(30, rel=0.1)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_jain_lies_between_one_over_n_and_one(values: list[float]) -> None:
    assert 1 / len(values) - 1e-9 <= jain(np.array(values)) <= 1 + 1e-9
