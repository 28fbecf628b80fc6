"""Arrival processes: right count, right spacing, right burstiness, and the same again from the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inlaid.workload.arrivals import Arrivals, arrival_times


def times(spec: Arrivals, duration: float | None = None, count: int | None = None, seed: int = 0) -> np.ndarray:
    return arrival_times(spec, duration, count, np.random.default_rng(seed))


def test_burst_is_all_at_once() -> None:
    assert times(Arrivals("burst"), count=7).tolist() == [0.0] * 7


def test_fixed_has_equal_gaps_and_the_exact_count() -> None:
    found = times(Arrivals("fixed", rate=4), duration=25)
    assert len(found) == 100
    assert np.allclose(np.diff(found), 0.25)


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gamma_gaps_have_the_asked_rate_and_variation(cv: float) -> None:
    gaps = np.diff(times(Arrivals("gamma", rate=10, cv=cv), count=40_000))
    assert gaps.mean() == pytest.approx(0.1, rel=0.08)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08)


def test_poisson_gaps_have_variation_one() -> None:
    gaps = np.diff(times(Arrivals("poisson", rate=10), count=40_000))
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.03)


def test_on_off_is_silent_in_every_off_window() -> None:
    found = times(Arrivals("on-off", rate=5, on_s=6, off_s=4), duration=100)
    assert (found % 10 < 6).all()
    assert len(found) == pytest.approx(300, abs=5)


def test_on_off_reaches_a_count_without_a_duration() -> None:
    assert len(times(Arrivals("on-off", rate=5, on_s=1, off_s=9, within="poisson"), count=50)) == 50


def test_ramp_of_the_vtc_suite_makes_660_requests() -> None:
    found = times(Arrivals("ramp", rate=0.2, end_rate=2.0), duration=600)
    assert len(found) == pytest.approx(660, abs=1)
    late, early = found[found > 500], found[found < 100]
    assert len(late) > 4 * len(early)


@settings(deadline=None)
@given(
    process=st.sampled_from(["fixed", "poisson", "gamma", "on-off", "ramp"]),
    rate=st.floats(0.1, 50),
    duration=st.floats(0.5, 40),
    count=st.one_of(st.none(), st.integers(1, 60)),
    seed=st.integers(0, 99),
)
def test_times_are_sorted_inside_the_limits_and_repeatable(
    process: str, rate: float, duration: float, count: int | None, seed: int
) -> None:
    spec = Arrivals(process, rate=rate, end_rate=rate * 2, on_s=1, off_s=1)  # type: ignore[arg-type]
    found = times(spec, duration, count, seed)
    assert (np.diff(found) >= 0).all()
    assert ((found >= 0) & (found < duration)).all()
    assert count is None or len(found) <= count
    assert np.array_equal(found, times(spec, duration, count, seed))


@pytest.mark.parametrize("bad", [{"rate": 0}, {"rate": -1}, {"cv": 0}, {"process": "ramp"}, {"on_s": 0}])
def test_impossible_specs_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"must be above 0|needs end_rate|rates must"):
        Arrivals(**bad)


def test_a_process_without_a_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="needs num_requests or duration_s"):
        times(Arrivals("poisson"))
