"""The CPU comparison measures what it says: the same requests on both sides, answered alike."""

from __future__ import annotations

import pytest

from perf import cpu_speed


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")  # peft, of linears without this adapter
def test_both_sides_answer_the_same_requests_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_speed, "MAX_TOKENS", 3)
    monkeypatch.setattr(cpu_speed, "PER_ADAPTER", 2)
    report = cpu_speed.report(repeats=1, threads=1)
    assert report["what"] == "12 adapters, 24 requests, 3 tokens each, fp32, greedy"
    assert report["requests_with_equal_tokens"] == "24 of 24"
    assert report["best_of_peft_adapter_by_adapter"].startswith(cpu_speed.BY_ADAPTER)
    seconds = report["seconds"]
    assert set(report["tokens_per_second"]) == set(seconds) >= {"inlaid", cpu_speed.MIXED}


def test_slow_ways_leave_the_race_with_the_time_they_took(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {"inlaid": 1.0, f"{cpu_speed.BY_ADAPTER}, fast": 4.0, f"{cpu_speed.BY_ADAPTER}, slow": 6.1}
    order: list[str] = []

    def timed(side: object) -> tuple[cpu_speed.Timing, dict[str, list[int]]]:
        name = side()  # type: ignore[operator]
        order.append(name)
        return cpu_speed.Timing([took[name]], [took[name]]), {}

    monkeypatch.setattr(cpu_speed, "_time", timed)
    timings, _ = cpu_speed.measure({name: lambda name=name: name for name in took}, repeats=2)  # type: ignore[misc]
    inlaid, fast, slow = took
    assert order == [inlaid, fast, slow, inlaid, fast, inlaid, fast]
    assert {name: timing.wall for name, timing in timings.items()} == {
        inlaid: [1.0, 1.0],
        fast: [4.0, 4.0],
        slow: [6.1],
    }
