"""The recorded experiments are what the scheduler of now does: some of them, made again. A change that moves them is
either a mistake or a reason to record them all anew (the command is in each file)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inlaid.sim.experiment import prepare, run
from inlaid.sim.metrics import summarize
from inlaid.workload.suites import load_suite

RESULTS = Path(__file__).parents[2] / "perf" / "results"


LONG = pytest.mark.long


@pytest.mark.parametrize("policy", ["fcfs", "vtc"])
@pytest.mark.parametrize(
    "suite", ["overload", *(pytest.param(suite, marks=LONG) for suite in ("on_off_overload", "poisson_short_long"))]
)
def test_a_suite_goes_as_recorded(suite: str, policy: str) -> None:
    recorded = json.loads((RESULTS / f"sim-{suite}.json").read_text())
    (then,) = (row for row in recorded["rows"] if row["policy"] == policy)
    experiment = prepare(load_suite(recorded["suite"]), recorded["seed"])
    now = summarize(run(experiment, policy), experiment.duration, then["bound"], experiment.workload.weights)
    for figure in ("throughput", "mean_ttft", "mean_latency", "largest_gap"):
        assert now[figure] == pytest.approx(then[figure], rel=0.005), figure
    assert now["requests"] == then["requests"]
    assert abs(now["preemptions"] - then["preemptions"]) <= 5
