"""The report on adding tasks while serving, from what a client has seen."""

from __future__ import annotations

import pytest

from perf.online_tasks import Watch, marks, series, stage_of, summarize, table


def watch() -> Watch:
    """Return a minute of two tokens a second, one a second from the order at 20 s to the switch at 40 s."""
    seen = Watch(ordered=120.0, switched=140.0)
    at = 100.0
    while at < 160:
        gap = 1.0 if 120 <= at < 140 else 0.5
        at += gap
        seen.tokens.append((at, gap))
    seen.reports = [
        (120.0, "running", "checking tasks, layer 0"),
        (125.0, "running", "layer 0, task c"),
        (130.0, "running", "layer 0 solved"),
        (140.0, "serving", "done"),
    ]
    seen.card = {"state": "serving", "seconds": {"solving": 4.0, "resting": 9.0, "forward": 2.0, "Hessians": 1.0},
                 "memory": {"peak": 1 << 30}, "before": {"a": 1.0}, "after": {"a": 1.5, "c": 2.0}}  # fmt: skip
    seen.base = {"last_switch": {"pause": 0.002, "staying": 3}}
    return seen


def test_the_dip_and_the_stages_are_those_that_were_seen() -> None:
    found = summarize(watch(), 20.0, 20.0)
    assert found["windows"]["before"]["tokens_per_s"] == pytest.approx(2.0, rel=0.05)
    assert found["dip"] == pytest.approx(0.5, abs=0.03)
    assert found["p99_growth"] == pytest.approx(1.0)
    assert found["stage_seconds"] == {"check the new task": 5.0, "forward and Hessians": 5.0, "solve": 10.0}
    assert marks(watch()) == [
        (0.0, 5.0, "check the new task"), (5.0, 10.0, "forward and Hessians"), (10.0, 20.0, "solve"),
    ]  # fmt: skip
    rows = series(watch(), 20.0, 10.0)
    assert [round(row["tokens_per_s"]) for row in rows] == [2, 2, 1, 1, 2, 2]
    assert stage_of("checking quantized, layer 3") == "check all tasks"


def test_the_report_names_windows_switch_and_cost() -> None:
    result = {
        "summary": summarize(watch(), 20.0, 20.0),
        "share": 0.1,
        "provenance": {"command": "python -m perf.online_tasks", "commit": "abc"},
    }
    job = {"parts": {"solving": 5.0, "checking": 2.0, "forward": 1.0}, "seconds": 10.0, "peak_mib": 900.0}
    cost = {
        "jobs": {"exact": job, "full": job},
        "worst_old_task": {"exact": 0.1, "full": 0.1},
    }
    page = table(result, cost)
    assert "Throughput while the job ran: -" in page
    assert "no step for 2.0 ms, 3 requests finished on the old base" in page
    assert "| one more, offline, exact | 1.0 | 5.0 | 2.0 | 2.0 | 10.0 | 900 | +0.1000 |" in page
    assert "| one more, online (wall seconds without rests) | 3.0 | 4.0 | 0.0 | 0.0 | 7.0 | 1024 | +0.5000 |" in page
