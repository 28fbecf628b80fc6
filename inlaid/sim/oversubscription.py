"""More and more adapters for the same places on the device: time to first token and throughput against adapters per
place, for each mode of having an adapter ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from inlaid.adapters.modes import CPU_ASSIST, SIMULATED
from inlaid.report import tables
from inlaid.sim.experiment import prepare
from inlaid.sim.simulate import simulate
from inlaid.workload.spec import Workload
from inlaid.workload.suites import load_suite

SUITE = "zipf-adapters"
ABOUT = "64 places for 32 to 1,024 adapters of rank 16, Zipf 1.0, 256 tokens in and 128 out"
RATIOS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def compare(
    machine: str, seed: int, workload: Workload | None = None, ratios: Sequence[float] = RATIOS
) -> list[dict[str, Any]]:
    """Simulate every ratio and mode, a row each. cpu-assist needs a machine whose file says what the CPU takes."""
    workload = load_suite(SUITE) if workload is None else workload
    rows = []
    for ratio in ratios:
        count = int((workload.engine.max_loras or 1) * ratio)
        adapters = msgspec.structs.replace(workload.adapters, count=count)
        experiment = prepare(msgspec.structs.replace(workload, adapters=adapters), seed, machine)
        modes = [mode for mode in SIMULATED if mode != CPU_ASSIST or experiment.setup.cost.assist]
        for mode in modes:
            outcome = simulate(experiment.trace, replace(experiment.setup, adapter_mode=mode, lengths="none"))
            first = [1e3 * record.ttft for record in outcome.records if record.ttft is not None]
            tokens = sum(record.output_len for record in outcome.records if record.ttft is not None)
            rows.append(
                {
                    "adapters_per_place": ratio,
                    "mode": mode,
                    "ttft_p50_ms": round(float(np.percentile(first, 50)), 2),
                    "ttft_p99_ms": round(float(np.percentile(first, 99)), 2),
                    "output_tokens_per_second": round(tokens / outcome.end, 1),
                    "loads": outcome.loads,
                }
            )
    return rows


def lines(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    """Group the points of a figure by mode."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        found.setdefault(str(row["mode"]), []).append((row["adapters_per_place"], row[key]))
    return found


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows as a table of all their keys."""
    names = list(rows[0])
    return tables.markdown(names, ([row[name] for name in names] for row in rows), "l") + "\n"
