"""The comparison of speculation with plain decoding: its table, and a trace at a GPU's step times."""

from __future__ import annotations

import json

from inlaid.sim.traced import Acceptances
from perf import speculation

RESULTS = speculation.ROOT / "perf" / "results" / "speculation-cpu.json"


def test_the_recorded_table_is_made_of_the_recorded_figures() -> None:
    assert speculation.as_markdown(json.loads(RESULTS.read_text())) == RESULTS.with_suffix(".md").read_text()


def test_a_trace_is_served_at_the_step_times_of_a_gpu() -> None:
    steps = speculation.h200()
    assert round(1e3 * (steps.step + steps.decodes), 3) == speculation.H200_7B[1]
    right, wrong = (Acceptances({"a": [(4, count)]}) for count in (3, 0))
    assert speculation.simulated(right, 1)["times_faster"] > 2
    assert 0.7 < speculation.simulated(wrong, 1)["times_faster"] < 1.05


def test_choosing_is_timed_by_request_and_step() -> None:
    assert all(value > 0 for value in speculation.host_cost(4, 3).values())
