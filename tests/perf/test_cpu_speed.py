"""The CPU comparison measures what it says: the same requests on both sides, answered alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import cpu_speed


def few(folder: Path, *names: str) -> None:
    """Make a folder of the demo with a few of its adapters."""
    (folder / "adapters").mkdir()
    for part in ("base", *(f"adapters/{name}" for name in names)):
        (folder / part).symlink_to(cpu_speed.DEMO / part)


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")  # peft, of linears without this adapter
def test_both_sides_answer_the_same_requests_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, long: bool) -> None:
    monkeypatch.setattr(cpu_speed, "MAX_TOKENS", 3)
    monkeypatch.setattr(cpu_speed, "PER_ADAPTER", 2)
    if not long:  # each adapter's answers are compared with peft's in tests/models too
        few(tmp_path, "code", "maths", "to_velar")
        monkeypatch.setattr(cpu_speed, "DEMO", tmp_path)
    report = cpu_speed.report(repeats=1, threads=1)
    number = 12 if long else 3
    assert report["what"] == f"{number} adapters, {2 * number} requests, 3 tokens each, fp32, greedy"
    assert report["requests_with_equal_tokens"] == f"{2 * number} of {2 * number}"
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
