"""More adapters than places: loading costs beyond the places, and the command leaves tables and figures."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from inlaid.adapters.modes import CACHED, ON_DEMAND, PIPELINED
from inlaid.sim import oversubscription
from inlaid.sim.command import main
from inlaid.workload.plan import rescale_rate
from inlaid.workload.spec import Workload
from inlaid.workload.suites import load_suite

RESULTS = Path(__file__).parents[2] / "perf" / "results"


def shortened(rate: float, seconds: float) -> Workload:
    workload = rescale_rate(load_suite(oversubscription.SUITE), rate)
    (stream,) = workload.streams
    return msgspec.structs.replace(
        workload, streams=[msgspec.structs.replace(stream, num_requests=int(rate * seconds))], duration_s=seconds
    )


def test_only_adapters_beyond_the_places_cost_time() -> None:
    """Up to as many adapters as places all modes are the ideal, once they are there; beyond, loading costs."""
    workload = shortened(rate=20.0, seconds=10.0)
    rows = oversubscription.compare("h200", 1, workload, ratios=(0.5, 8.0))
    found = {(row["mode"], row["adapters_per_place"]): row for row in rows}
    assert found[ON_DEMAND, 0.5]["loads"] <= (workload.engine.max_loras or 0) // 2
    assert found[ON_DEMAND, 8.0]["ttft_p99_ms"] >= found[PIPELINED, 8.0]["ttft_p99_ms"]
    assert found[PIPELINED, 8.0]["ttft_p99_ms"] > found[CACHED, 8.0]["ttft_p99_ms"]
    assert found[CACHED, 8.0]["loads"] == 0
    assert len(oversubscription.markdown(rows).splitlines()) == 2 + len(rows)
    assert set(oversubscription.lines(rows, "ttft_p50_ms")) == {CACHED, ON_DEMAND, PIPELINED}


def test_the_sweep_goes_as_recorded() -> None:
    recorded = json.loads((RESULTS / "sim-oversubscription.json").read_text())
    rows = oversubscription.compare(recorded["machine"], recorded["seed"], ratios=(2.0,))
    assert rows == [row for row in recorded["rows"] if row["adapters_per_place"] == 2.0]


def test_the_command_leaves_a_table_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    whole = oversubscription.compare
    small = shortened(rate=10.0, seconds=2.0)
    monkeypatch.setattr(oversubscription, "compare", lambda machine, seed, _: whole(machine, seed, small, (0.5, 2.0)))
    assert main(["--suite", "oversubscription", "--out", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "oversubscription.json", "oversubscription.md", "oversubscription-p99.png", "oversubscription-median.png",
    } <= names  # fmt: skip
