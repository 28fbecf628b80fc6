"""Step times of machines, and what recorded guesses bring at these: the simulated part of `perf/speculation.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from inlaid.config import SpeculationConfig
from inlaid.engine.step_log import Load
from inlaid.sim.closed_loop import serve
from inlaid.sim.cost import CostModel
from inlaid.sim.traced import Acceptances

RESULTS = Path(__file__).parent / "results"
TRACE = RESULTS / "speculation-trace.json"
CONCURRENCIES = (1, 4, 16, 64)
GUESSES = 8
ROUNDS = 8  # simulated answers of each task, or twice as many as requests at a time
# A 7B with 32 adapters on an H200, from `perf/results/speculation-h200.json`, in milliseconds: a plain step by
# requests, with a kernel for each operation and with one kernel for few rows; what guesses add, by all tokens of the
# step; steps with guesses that are one kernel, by tokens; and the host's work before a step, which a look exposes.
PLAIN: Mapping[str, Mapping[int, float]] = MappingProxyType({
    "layers": MappingProxyType({1: 2.73, 4: 3.02, 16: 3.70, 64: 6.69}),
    "auto": MappingProxyType({1: 1.54, 2: 1.73, 4: 2.10, 5: 3.05, 16: 3.71, 64: 6.69}),
})  # fmt: skip
MORE: Mapping[int, float] = MappingProxyType({16: 0.0, 32: 0.37, 64: 1.07, 128: 1.5, 256: 3.9})
ONE_KERNEL: Mapping[int, float] = MappingProxyType({2: 1.65, 4: 2.10})
HOST, HOST_ROW = 0.34, 0.0225


def settings(length: str) -> SpeculationConfig:
    """Return the settings of speculation with as many guesses as pay (auto), or all (fixed)."""
    return SpeculationConfig(speculation="suffix", num_speculative_tokens=GUESSES, speculation_length=length)


def curve(points: Mapping[int, float]) -> tuple[float, float]:
    """Return the seconds of a step and of a row of the line through the smallest and the largest of (rows, ms)."""
    low, high = min(points), max(points)
    slope = (points[high] - points[low]) / (high - low) / 1e3
    return points[low] / 1e3 - slope * low, slope


@dataclass(frozen=True)
class Measured(CostModel):
    """Steps of the 7B on an H200: those of decodes by the tables, others by a line through them."""

    kernel: str = "layers"

    def step_seconds(self, load: Load) -> float:
        if load.prefills:
            return super().step_seconds(load)
        rows, plain = load.decodes + load.guesses, PLAIN[self.kernel]
        if not load.guesses:
            return between(plain, load.decodes) / 1e3
        if self.kernel == "auto" and rows <= max(ONE_KERNEL):
            return next(took for most, took in ONE_KERNEL.items() if rows <= most) / 1e3
        captured = next((took for most, took in MORE.items() if rows <= most), max(MORE.values()))
        return (between(PLAIN["layers"], load.decodes) + captured) / 1e3


def between(points: Mapping[int, float], size: int) -> float:
    """Return the value at a size on the line between the points around it."""
    sizes = sorted(points)
    low = max(one for one in sizes if one <= size)
    high = min((one for one in sizes if one >= size), default=low)
    share = (size - low) / (high - low) if high > low else 0.0
    return points[low] + share * (points[high] - points[low])


def h200(kernel: str = "layers") -> CostModel:
    """Return the measured steps of a 7B on an H200 as a cost model."""
    step, row = curve(PLAIN["layers"])
    return Measured(
        name=f"h200-7b-{kernel}", source="perf/results/speculation-h200.json", step=step, decodes=row,
        prefill_tokens=2e-5, host=HOST / 1e3, host_rows=HOST_ROW / 1e3, kernel=kernel,
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
        "rows": [simulated(cost, trace, concurrency, overlap) for concurrency in concurrencies],
        "times_faster_by_task_at_1": alone,
        "mean_over_tasks_at_1": round(statistics.mean(alone.values()), 3),
    }  # fmt: skip
