"""Step times of machines, and what recorded guesses bring at these: the simulated part of `perf/speculation.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from inlaid.config import SpeculationConfig
from inlaid.sim.closed_loop import serve
from inlaid.sim.cost import CostModel
from inlaid.sim.traced import Acceptances

RESULTS = Path(__file__).parent / "results"
TRACE = RESULTS / "speculation-trace.json"
CONCURRENCIES = (1, 4, 16, 64)
GUESSES = 8
ROUNDS = 8  # simulated answers of each task, or twice as many as requests at a time
# Step times of a 7B with 32 adapters on an H200, from `perf/results/speculation-h200.json`: milliseconds of a plain
# step by requests, of a row that a guess adds, and of the host's work before a step, which looks for drafts expose.
H200_7B: Mapping[int, float] = MappingProxyType({1: 2.713, 4: 2.95, 16: 3.699, 64: 6.756})
H200_GUESS = 0.064
H200_HOST, H200_HOST_WORK = 0.35, 0.011


def settings(length: str) -> SpeculationConfig:
    """Return the settings of speculation with as many guesses as pay (auto), or all (fixed)."""
    return SpeculationConfig(speculation="suffix", num_speculative_tokens=GUESSES, speculation_length=length)


def curve(points: Mapping[int, float]) -> tuple[float, float]:
    """Return the seconds of a step and of a row of the line through the smallest and the largest of (rows, ms)."""
    low, high = min(points), max(points)
    slope = (points[high] - points[low]) / (high - low) / 1e3
    return points[low] / 1e3 - slope * low, slope


def h200() -> CostModel:
    """Return the measured steps of a 7B on an H200 as a cost model."""
    step, row = curve(H200_7B)
    return CostModel(
        name="h200-7b", source="perf/results/speculation-h200.json", step=step, decodes=row, prefill_tokens=2e-5,
        guesses=H200_GUESS / 1e3, host=H200_HOST / 1e3, host_rows=H200_HOST_WORK / 1e3,
    )  # fmt: skip


def this_machine(times: Sequence[Mapping[str, float]]) -> CostModel:
    """Return the measured steps of the demo on this machine as a cost model."""
    plain = {int(one["requests"]): one["ms"] for one in times if not one["guesses"]}
    step, row = curve(plain)
    most = [one for one in times if one["guesses"] == GUESSES]
    rows = [(one["ms"] - plain[int(one["requests"])]) / one["guesses"] / one["requests"] for one in most]
    return CostModel(
        name="demo", source="perf.speculation: step_times", step=step, decodes=row, prefill_tokens=row / 2,
        guesses=max(1e-6, statistics.median(rows) / 1e3),
    )  # fmt: skip


def simulated(
    cost: CostModel, trace: Acceptances, concurrency: int, overlap: bool, tasks: Sequence[str] = ()
) -> dict[str, Any]:
    """Serve the trace's answers side by side at these step times, without drafts, with as many as pay, with all."""
    number = max(ROUNDS * (len(tasks) or len(trace.by_adapter)), 2 * concurrency)
    served = {
        name: serve(
            cost, trace, concurrency, number, tasks=tasks, overlap=overlap,
            speculation=None if name == "off" else settings(name),
        )
        for name in ("off", "auto", "fixed")
    }  # fmt: skip
    return {
        "concurrency": concurrency,
        "tokens_a_step": round(served["auto"].tokens / served["auto"].steps / concurrency, 3),
        "times_faster": round(served["auto"].rate / served["off"].rate, 3),
        "times_faster_with_all_guesses": round(served["fixed"].rate / served["off"].rate, 3),
    }


def simulations(cost: CostModel, trace: Acceptances, concurrencies: Sequence[int], overlap: bool) -> dict[str, Any]:
    """Simulate the mix of all tasks at several concurrencies, and each task alone at one request."""
    alone = {task: simulated(cost, trace, 1, overlap, (task,))["times_faster"] for task in sorted(trace.by_adapter)}
    return {
        "step_times": {"step_ms": cost.step * 1e3, "request_ms": cost.decodes * 1e3, "guess_ms": cost.guesses * 1e3,
                       "host_ms": cost.host * 1e3, "host_request_ms": cost.host_rows * 1e3},
        "rows": [simulated(cost, trace, concurrency, overlap) for concurrency in concurrencies],
        "times_faster_by_task_at_1": alone,
        "mean_over_tasks_at_1": round(statistics.mean(alone.values()), 3),
    }  # fmt: skip
