"""The numbers behind the plots."""

from __future__ import annotations

import pytest

from perf import series
from perf.records import Record
from perf.series import Run


def run(records: list[Record], label: str = "r", **summary: object) -> Run:
    duration = max(r.finished for r in records) - min(r.due for r in records)
    return Run(label, {"duration": duration, **summary}, records)


def one(due: float, ttft: float, gaps: list[float], tenant: str = "a") -> Record:
    end = due + ttft + sum(gaps)
    return Record(0, tenant, tenant, "default", due, due, end, "ok", 10, len(gaps) + 1, 9, ttft, gaps, 200)


def test_rates_count_what_is_due_and_what_is_answered() -> None:
    found = run([one(5.0 + at, 1.0, [1.0]) for at in (0, 0.2, 1.5, 2.9)])
    assert series.rate(found, 1.0, finished=False)[1] == [2, 1, 1, 0, 0]
    assert series.rate(found, 1.0, finished=True)[1] == [0, 0, 2, 1, 1]
    x, y = series.output_rate(found, 1.0)
    assert x == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert sum(y) == 8


def test_percentiles_over_time_leave_out_empty_buckets() -> None:
    found = run([one(0.0, 0.1, [0.02] * 3), one(0.5, 0.3, [0.04]), one(9.0, 0.2, [0.05])])
    assert series.percentile_over_time(found, "ttft", 50, 1.0) == ([0.5, 9.5], pytest.approx([200, 200]))
    assert series.percentile_over_time(found, "itl", 100, 10.0) == ([5.0], pytest.approx([50]))


def test_distribution_goes_from_zero_to_one() -> None:
    x, y = series.distribution(run([one(0, 0.1 * i, [0.01]) for i in range(1, 6)]), "ttft")
    assert (x[0], x[-1], y[0], y[-1]) == (pytest.approx(100), pytest.approx(500), 0, 1)
    refused = Record(0, "a", "a", "default", 0, 0, 1, "refused", 1, 0, 1)
    assert series.distribution(run([refused]), "e2el") == ([], [])


def test_cumulative_service_ends_at_all_of_it() -> None:
    records = [one(float(at), 0.1, [0.1] * 4, tenant) for at in range(5) for tenant in "ab"]
    curves = series.cumulative_service(run(records))
    assert {name: y[-1] for name, (_, y) in curves.items()} == {"a": 5 * 20, "b": 5 * 20}
    many = [one(float(i), 0.1, [], f"t{i:02d}") for i in range(20)]
    assert len(series.cumulative_service(run(many))) == 6


def test_curves_join_runs_that_differ_only_in_rate() -> None:
    records = [one(0, 0.1, [0.1])]
    runs = [
        run(records, f"m/rate-{rate}/policy-{policy}", offered_rate=rate, slo={"attainment": 1 / rate})
        for policy in ("fcfs", "vtc")
        for rate in (4.0, 1.0, 2.0)
    ]
    curves = series.against_rate(runs, "attainment")
    assert curves == {f"m/policy-{policy}": ([1, 2, 4], [1, 0.5, 0.25]) for policy in ("fcfs", "vtc")}


@pytest.mark.parametrize(("duration", "width"), [(3, 0.1), (60, 1), (61, 2), (3600, 60), (1e6, 1e6 / 60)])
def test_buckets_are_round_and_at_most_sixty(duration: float, width: float) -> None:
    assert series.bucket_width(duration) == width
