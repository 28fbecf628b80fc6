"""The cluster sweep: a burst of requests for 1,000 adapters under every placement, by load and popularity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inlaid.cluster.placement import PLACEMENTS, make_placement
from inlaid.report import tables
from inlaid.sim.cluster import ClusterOutcome, simulate_cluster
from inlaid.sim.cost import load_cost, prices_of
from inlaid.sim.experiment import draw_trace
from inlaid.sim.simulate import Setup
from inlaid.workload.arrivals import Arrivals
from inlaid.workload.lengths import Lengths
from inlaid.workload.popularity import AdapterChoice
from inlaid.workload.spec import AdapterSet, Stream, Workload

NAME = "cluster"
ABOUT = (
    "8 replicas of 64 places and 64 seats, 1,000 adapters of ranks 8 to 64; 60 s at the rate, 15 s at five times it, "
    "15 s at the rate; within the objective: first token in 1 s, 100 ms for each token after it"
)
MACHINE = "a10g"
REPLICAS = 8
SEEDS = 1
RATES = (6.0, 8.0)
ZIPFS = (1.0, 1.4)
BURST = 5.0
CALM, HIGH, AFTER = 60.0, 15.0, 15.0
TTFT, TPOT = 1.0, 0.1
OBJECTIVE = 0.8 * TPOT  # what placement aims at: prefills come on top of decode steps


def workload(
    rate: float,
    zipf: float,
    seed: int,
    adapters: int = 1000,
    calm: float = CALM,
    high: float = HIGH,
    after: float = AFTER,
) -> Workload:
    """Return a stream at a rate, and a second one that brings it to five times that for a while."""
    kind: dict[str, Any] = {
        "adapters": AdapterChoice("zipf", alpha=zipf),
        "input": Lengths("lognormal", median=256.0, sigma=0.6, low=8, high=2000),
        "output": Lengths("lognormal", median=128.0, sigma=0.6, low=2, high=1000),
    }
    always = Stream(arrival=Arrivals("poisson", rate), duration_s=calm + high + after, **kind)
    burst = Stream(arrival=Arrivals("poisson", rate * (BURST - 1)), start_s=calm, duration_s=high, **kind)
    return Workload([always, burst], seed, adapters=AdapterSet(count=adapters, ranks=(8, 16, 32, 64)))


def setup_of(machine: str, drawn: Workload, slots: int = 64) -> Setup:
    """Return one replica of the sweep."""
    return Setup(
        cost=load_cost(machine),
        num_tokens=60_000,
        slots=slots,
        ranks=drawn.adapter_ranks,
        lengths="none",
        scheduler={"max_num_seqs": 64},
        max_paired_tenants=0,
    )


def compare(machine: str, rate: float, zipf: float, seed: int, num_replicas: int = REPLICAS) -> list[dict[str, Any]]:
    """Simulate every placement, a row each."""
    drawn = workload(rate, zipf, seed)
    trace, setup = draw_trace(drawn), setup_of(machine, drawn)
    rows = []
    for name in PLACEMENTS:
        placement = make_placement(name, prices_of(setup.cost), seed, OBJECTIVE)
        outcome = simulate_cluster(trace, setup, placement, num_replicas)
        rows.append({"rate": rate, "zipf": zipf, "seed": seed, "placement": name, **measure(outcome)})
    return rows


def measure(outcome: ClusterOutcome) -> dict[str, Any]:
    """Return a row's figures."""
    first = [record.ttft for record in outcome.records if record.ttft is not None]
    between = [
        (record.finish - record.first_token) / max(1, record.output_len - 1)
        for record in outcome.records
        if record.finish is not None and record.first_token is not None
    ]
    well = sum(one <= TTFT and other <= TPOT for one, other in zip(first, between))
    return {
        "requests": len(outcome.records),
        "ttft_p50_ms": round(1e3 * float(np.percentile(first, 50)), 1),
        "ttft_p99_ms": round(1e3 * float(np.percentile(first, 99)), 1),
        "tpot_p99_ms": round(1e3 * float(np.percentile(between, 99)), 1),
        "loads": outcome.loads,
        "attainment": round(well / len(outcome.records), 4),
    }


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["rate"], row["zipf"], row["placement"]), []).append(row)
    keys = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p99_ms", "loads", "attainment")
    return [
        {"rate": rate, "zipf": zipf, "placement": name, **{k: float(np.mean([r[k] for r in group])) for k in keys}}
        for (rate, zipf, name), group in groups.items()
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Format the means over seeds."""
    head = ("rate", "Zipf", "placement", "TTFT p50 ms", "TTFT p99 ms", "TPOT p99 ms", "loads", "attainment")
    lines = [
        [
            f"{row['rate']:g}",
            f"{row['zipf']:g}",
            row["placement"],
            f"{row['ttft_p50_ms']:.0f}",
            f"{row['ttft_p99_ms']:.0f}",
            f"{row['tpot_p99_ms']:.0f}",
            f"{row['loads']:.0f}",
            f"{row['attainment']:.1%}",
        ]
        for row in means(rows)
    ]
    return tables.markdown(head, lines, "rrlrrrrr") + "\n"


def bars(rows: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Group a figure's bars by load."""
    groups: dict[str, dict[str, float]] = {}
    for row in means(rows):
        groups.setdefault(f"Zipf {row['zipf']:g}, {row['rate']:g} rps", {})[row["placement"]] = row[key]
    return groups
