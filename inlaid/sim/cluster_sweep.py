"""The cluster sweep: a burst of requests for 1,000 adapters under every placement, by load and popularity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from inlaid.cluster.placement import PLACEMENTS, make_placement
from inlaid.report import tables
from inlaid.sim.cluster import ClusterOutcome, simulate_cluster
from inlaid.sim.cost import CostModel, Load, load_cost, prices_of
from inlaid.sim.experiment import draw_trace
from inlaid.sim.request_log import Arrival
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
SEEDS = 3  # the further ones for Ray's rule and ours alone
RATES = (6.0, 8.0)
ZIPFS = (1.0, 1.4)
BURST = 5.0
CALM, HIGH, AFTER = 60.0, 15.0, 15.0
TTFT, TPOT = 1.0, 0.1
OBJECTIVE = 0.8 * TPOT  # what placement aims at: prefills come on top of decode steps
RAYS, OURS, ALONE = "multiplexed", "predicted", "alone (bound)"


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


def compare(
    machine: str, rate: float, zipf: float, seed: int, names: Iterable[str] = PLACEMENTS
) -> list[dict[str, Any]]:
    """Simulate placements, a row each."""
    drawn = workload(rate, zipf, seed)
    trace, setup = draw_trace(drawn), setup_of(machine, drawn)
    rows = []
    for name in names:
        placement = make_placement(name, prices_of(setup.cost), seed, OBJECTIVE)
        outcome = simulate_cluster(trace, setup, placement, REPLICAS, share_service=False)
        rows.append({"rate": rate, "zipf": zipf, "seed": seed, "placement": name, **measure(outcome)})
    rows.append({"rate": rate, "zipf": zipf, "seed": seed, "placement": ALONE, **alone(trace, setup.cost)})
    return rows


def alone(trace: Sequence[Arrival], cost: CostModel) -> dict[str, Any]:
    """Return the first tokens' times if each request had a replica to itself that holds its adapter. No placement can
    be better: a prompt's step takes at least as long with other work in it."""
    first = [cost.step_seconds(Load(prefill_tokens=len(each.request.prompt), prefills=1)) for each in trace]
    return {"requests": len(trace), **_percentiles(first)}


def _percentiles(first: Sequence[float]) -> dict[str, float]:
    return {f"ttft_p{q}_ms": round(1e3 * float(np.percentile(first, q)), 1) for q in (50, 99)}


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
        **_percentiles(first),
        "tpot_p99_ms": round(1e3 * float(np.percentile(between, 99)), 1),
        "loads": outcome.loads,
        "attainment": round(well / len(outcome.records), 4),
    }


def of_all(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the first seed, under which every placement was simulated."""
    return [row for row in rows if row["seed"] == rows[0]["seed"]]


def gains(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return, for each point, p99 of the time to first token under Ray's rule as a multiple: of ours, by the means over
    seeds and for the seeds of the least and the largest multiple; and of the bound."""
    times: dict[tuple[float, float], dict[str, list[float]]] = {}
    for row in rows:
        times.setdefault((row["rate"], row["zipf"]), {}).setdefault(row["placement"], []).append(row["ttft_p99_ms"])
    lines = []
    for (rate, zipf), by_name in times.items():
        rays, ours = np.array(by_name[RAYS]), np.array(by_name[OURS])
        figures = (rays.mean() / ours.mean(), (rays / ours).min(), (rays / ours).max())
        bound = rays.mean() / np.mean(by_name[ALONE])
        lines.append([f"{rate:g}", f"{zipf:g}", *(f"{figure:.1f}" for figure in (*figures, bound))])
    return lines


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Format the first seed's rows, and what further seeds say of Ray's rule and ours."""
    head = ("rate", "Zipf", "placement", "TTFT p50 ms", "TTFT p99 ms", "TPOT p99 ms", "loads", "attainment")
    lines = [
        [
            f"{row['rate']:g}",
            f"{row['zipf']:g}",
            row["placement"],
            f"{row['ttft_p50_ms']:.0f}",
            f"{row['ttft_p99_ms']:.0f}",
            *(
                (f"{row['tpot_p99_ms']:.0f}", f"{row['loads']:.0f}", f"{row['attainment']:.1%}")
                if "loads" in row
                else 3 * "–"
            ),
        ]
        for row in of_all(rows)
    ]
    table = tables.markdown(head, lines, "rrlrrrrr")
    ratios = ("rate", "Zipf", "ours", "least of a seed", "most of a seed", "bound")
    seeds = len({row["seed"] for row in rows})
    about = f"p99 of the time to first token under Ray's rule as a multiple of ours and of the bound, {seeds} seeds:"
    return f"{table}\n\n{about}\n\n{tables.markdown(ratios, gains(rows), 'rrrrrr')}\n"


def bars(rows: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Group a figure's bars by load."""
    groups: dict[str, dict[str, float]] = {}
    for row in of_all(rows):
        if key in row:
            groups.setdefault(f"Zipf {row['zipf']:g}, {row['rate']:g} rps", {})[row["placement"]] = row[key]
    return groups
