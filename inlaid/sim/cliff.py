"""What happens as adapters outnumber the places for them on the device: time to first token and throughput against
adapters per place, for each mode of having an adapter ready. One machine, Poisson arrivals, Zipf 1.0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.report import tables
from inlaid.sim.adapters import CPU_ASSIST, MODES
from inlaid.sim.cost import CostModel, load_cost
from inlaid.sim.simulate import Arrival, Setup, simulate

ABOUT = "64 places for 32 to 1,024 adapters of rank 16, Zipf 1.0, 256 tokens in and 128 out"
PLACES = 64
RATIOS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
PROMPT, OUTPUT, RANK = 256, 128, 16


def make_trace(adapters: int, rate: float, seconds: float, seed: int) -> list[Arrival]:
    rng = np.random.default_rng(seed)
    count = int(rate * seconds)
    times = np.cumsum(rng.exponential(1 / rate, count))
    weights = 1.0 / np.arange(1, adapters + 1)
    picks = rng.choice(adapters, count, p=weights / weights.sum())
    params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    return [
        Arrival(
            float(when),
            NewRequest(id=str(n), prompt=[0] * PROMPT, params=params, adapter=f"a{pick}", true_output_len=OUTPUT),
        )
        for n, (when, pick) in enumerate(zip(times, picks, strict=True))
    ]


def compare(
    machine: str, seed: int, rate: float = 30.0, seconds: float = 40.0, ratios: Sequence[float] = RATIOS
) -> list[dict[str, Any]]:
    """A row for each ratio and mode. cpu-assist needs a machine whose file says what the CPU takes."""
    cost = load_cost(machine)
    modes = [mode for mode in MODES if mode != CPU_ASSIST or cost.assist]
    return [_row(cost, ratio, mode, rate, seconds, seed) for ratio in ratios for mode in modes]


def _row(cost: CostModel, ratio: float, mode: str, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    adapters = int(PLACES * ratio)
    ranks = {f"a{n}": RANK for n in range(adapters)}
    setup = Setup(cost, num_tokens=200_000, slots=PLACES, ranks=ranks, adapter_mode=mode, lengths="none", seed=seed)
    outcome = simulate(make_trace(adapters, rate, seconds, seed), setup)
    first = [1e3 * record.ttft for record in outcome.records if record.ttft is not None]
    return {
        "adapters_per_place": ratio,
        "mode": mode,
        "ttft_p50_ms": round(float(np.percentile(first, 50)), 2),
        "ttft_p99_ms": round(float(np.percentile(first, 99)), 2),
        "output_tokens_per_second": round(OUTPUT * len(first) / outcome.end, 1),
        "loads": outcome.loads,
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(rows[0])
    return tables.markdown(names, ([row[name] for name in names] for row in rows), "l") + "\n"


def lines(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    """Mode -> points, for the figure."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        found.setdefault(str(row["mode"]), []).append((row["adapters_per_place"], row[key]))
    return found
