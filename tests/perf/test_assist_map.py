"""The crossover map: its arithmetic, what it must imply, and its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf.assist_map import RESULTS, Case, Host, crossover, main, measured, times

CASE = Case(rank=64, prompt=256, prefill=0.012)
FAST, SLOW = Host("fast", 1e6), Host("slow", 1.0)


def test_a_free_cpu_hides_every_load_and_a_slow_one_none() -> None:
    assert times(CASE, 1.0, FAST)["cpu-assist"] == pytest.approx(CASE.prefill, rel=0.01)
    assert times(CASE, 1e6, SLOW)["on-demand"] == pytest.approx(CASE.prefill, rel=0.01)
    assert crossover(CASE, SLOW) < 0.2
    assert crossover(CASE, FAST) > 10


def test_pipelining_is_never_slower_than_waiting_for_the_whole() -> None:
    for link in (0.5, 5.0, 50.0):
        found = times(CASE, link, FAST)
        assert CASE.prefill <= found["pipelined"] <= found["on-demand"] == CASE.load(link) + CASE.prefill


def test_launches_one_by_one_move_the_crossover_to_slower_buses() -> None:
    host = Host("some", 700.0)
    assert 0 < crossover(CASE, host, 0.046) < crossover(CASE, host)


def test_the_recorded_cells_agree_with_the_map() -> None:
    """On the bus of the recorded run, which is faster than every crossover, on-demand won all cells but one."""
    prompts, launches, cells = measured(RESULTS)
    assert set(prompts) == {16, 256, 1024}
    assert all(value > 0 for value in prompts.values())
    host = Host("14 cores", 700.0)
    assert (
        max(
            crossover(Case(rank, prompt, prompts[prompt]), host, launches)
            for rank in (16, 64, 128)
            for prompt in prompts
        )
        < 20
    )
    helped = [min(v for k, v in row.items() if k.startswith("cpu-assist")) for row in cells]
    others = [min(row["on-demand_ms"], row["pipelined_ms"]) for row in cells]
    assert sum(a < b for a, b in zip(helped, others)) <= 1


def test_the_command_writes_the_map_and_its_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "map.json"
    assert main(["--host", "elsewhere=800", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert {row["host"] for row in record["rows"]} == set(record["hosts"])
    assert record["hosts"]["elsewhere"] == 800.0
    assert all(row["launched_gbps"] <= row["best_gbps"] for row in record["rows"])
    assert out.with_suffix(".png").exists()
    assert "## elsewhere: 800 GFLOP/s" in out.with_suffix(".md").read_text()
    assert "GB/s" in capsys.readouterr().out
