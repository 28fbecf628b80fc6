"""The placement sweep, after Toppings' figure 19: every way to choose a replica, under kernels that pad, kernels that
do not, and ours, by load; and some ways under the real engine, scheduler and all, as a check of this simulator.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from inlaid.cluster.placement import make_placement
from inlaid.report import tables
from inlaid.report.plots import colours, legend, new_figure, save
from inlaid.sim.cluster import simulate_cluster
from inlaid.sim.cost import CostModel, Load, load_cost, prices_of
from inlaid.sim.placement import DLORA, EXACT, MAX_BATCH, PADDED, Call, Kernel, choosers, functions_trace, run
from inlaid.sim.plot import KINDS
from inlaid.sim.request_log import Arrival, RequestRecord, as_arrivals
from inlaid.sim.simulate import Setup
from inlaid.workload.functions import Functions
from inlaid.workload.plan import PlannedRequest

NAME = "placement"
MACHINE = "h200"  # whose fitted steps are our kernels
MIGRATES = "dlora-migration"
RATES = (150.0, 200.0, 250.0, 300.0, 340.0)
SECONDS = 20.0
SEEDS = 3
PROMPT, OUTPUT = 64, 30  # tokens: of our kernels' prompts, and of answers when a step is made
REPLICAS = 6  # with our kernels: they are several times as fast as the published ones
SLACK = 1.5  # the objective of our kernels, as in the paper: so many times a full step without adapters
SHARES = tuple(range(0, 101, 2))  # of requests, for the distributions
ABOUT = (
    "60 instances of at most 32 rows (6 with our kernels), a minute of a trace of 40,000 functions whose adapters have "
    "ranks 8 to 64, 60 tokens an answer; latency over tokens, queueing included, against 40 ms (our kernels: 1.5 times "
    "a full step without adapters); means over three seeds"
)
ENGINES = {"random": "random", "most-idle": "least-loaded", "rank-aware": "rank-aware"}.items()  # names here and there


@dataclass(frozen=True)
class MachineKernel(Kernel):
    """The kernels of a machine that was fitted to measured steps. Placement predicts with linear terms, as in the
    paper; steps take what the machine says of all that is in them."""

    cost: CostModel = field(kw_only=True)

    def mixed(self, ranks: Sequence[int], fresh: int) -> float:
        decodes, count = len(ranks) - fresh, len(ranks)
        load = Load(
            prefill_tokens=fresh * PROMPT,
            prefills=fresh,
            decodes=decodes,
            prompt_context=decodes * PROMPT,
            output_context=decodes * OUTPUT,
            prefill_attention=fresh * PROMPT * PROMPT // 2,
            adapters=count,
            adapter_rows=count,
            ranks=sum(ranks),
        )
        return self.cost.step_seconds(load)


def ours(cost: CostModel) -> Kernel:
    """Return the kernels of a machine that was fitted to measured steps."""
    context = PROMPT * cost.prompt_context + OUTPUT * cost.output_context
    row = cost.decodes + context + cost.adapters + cost.adapter_rows
    full = cost.step + MAX_BATCH * (cost.decodes + context)
    return MachineKernel(
        "ours",
        cost.step,
        cost.ranks,
        False,
        per_row=row,
        prefill_share=1.0,
        prefill_more=cost.prefills + PROMPT * cost.prefill_tokens,
        slo=SLACK * full,
        replicas=REPLICAS,
        mixes=True,
        cost=cost,
        load_rank=cost.load_rank,
    )


def kernels(machine: str) -> dict[str, Kernel]:
    """Return the kernels that are compared, by name."""
    return {kernel.name: kernel for kernel in (PADDED, EXACT, ours(load_cost(machine)))}


def compare(
    rate: float, seed: int, kernel: Kernel, functions: Functions | None = None, seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """Simulate every way of choosing, a row each."""
    calls = functions_trace(rate, seconds, seed, functions)
    mean = statistics.fmean(call.tokens for call in calls)
    known = choosers(kernel.slo, mean)
    rows = []
    for name, choose in {**known, MIGRATES: known[DLORA]}.items():
        served = run(calls, choose, kernel, kernel.replicas, seed, name == MIGRATES)
        times = [(call.finish - call.arrival) / call.tokens for call in served]
        rows.append(
            {"placement": name, "kernel": kernel.name, "rate": rate, "seed": seed, **_figures(times, kernel.slo)}
        )
    return rows


def _figures(times: Sequence[float], slo: float) -> dict[str, Any]:
    return {
        "requests": len(times),
        "slo_ms": round(1e3 * slo, 2),
        "slo_attainment": sum(time <= slo for time in times) / len(times),
        "mean_ms": 1e3 * statistics.fmean(times),
        "p99_ms": 1e3 * statistics.quantiles(times, n=100)[-1],
        "cdf_ms": [round(1e3 * float(value), 2) for value in np.percentile(times, SHARES)],
    }


def check(
    machine: str, rate: float, seed: int, functions: Functions | None = None, seconds: float = 5.0
) -> list[dict[str, Any]]:
    """Serve the same calls by replicas of the real engine on the same machine; return a row for each placement, with
    the mean of this simulator beside it."""
    cost = load_cost(machine)
    kernel = ours(cost)
    calls = functions_trace(rate, seconds, seed, functions)
    mean = statistics.fmean(call.tokens for call in calls)
    trace, ranks = _arrivals(calls), {f"f{call.adapter}": call.rank for call in calls}
    setup = Setup(cost=cost, num_tokens=10**6, ranks=ranks, lengths="none", resident=tuple(ranks),
                  scheduler={"max_num_seqs": MAX_BATCH}, max_paired_tenants=0)  # fmt: skip
    rows = []
    for name, there in ENGINES:
        served = run(calls, choosers(kernel.slo, mean)[name], kernel, kernel.replicas, seed)
        here = statistics.fmean((call.finish - call.arrival) / call.tokens for call in served)
        placement = make_placement(there, prices_of(cost), seed, kernel.slo)
        outcome = simulate_cluster(trace, setup, placement, kernel.replicas, share_service=False)
        real = statistics.fmean(_per_token(outcome.records))
        rows.append({"placement": name, "rate": rate, "mean_ms": 1e3 * here, "engine_mean_ms": 1e3 * real})
    return rows


def _arrivals(calls: Sequence[Call]) -> list[Arrival]:
    names = sorted({f"f{call.adapter}" for call in calls})
    planned = [
        PlannedRequest(
            index=number, at=call.arrival, adapter=f"f{call.adapter}", tenant="", service_class="",
            prompt=[0] * PROMPT, prompt_len=PROMPT, output_len=call.tokens,
        )
        for number, call in enumerate(calls)
    ]  # fmt: skip
    return as_arrivals(planned, names, real=True)


def _per_token(records: Sequence[RequestRecord]) -> Iterator[float]:
    return (record.latency / record.output_len for record in records if record.latency is not None)


def attainments(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Average attainment over seeds, per rate and way."""
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        groups.setdefault(f"{row['rate']:g} rps", {}).setdefault(row["placement"], []).append(row["slo_attainment"])
    return {rate: {name: statistics.fmean(v) for name, v in ways.items()} for rate, ways in groups.items()}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a table of means over seeds."""
    cells: dict[tuple[str, float, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["kernel"], row["rate"], row["placement"]), []).append(row)
    lines = []
    for (kernel, rate, name), group in cells.items():
        mean = {key: statistics.fmean(row[key] for row in group) for key in ("slo_attainment", "mean_ms", "p99_ms")}
        figures = (f"{mean['slo_attainment']:.1%}", f"{mean['mean_ms']:.1f}", f"{mean['p99_ms']:.1f}")
        lines.append([kernel, f"{rate:g}", name, *figures])
    head = ("kernel", "rate", "placement", "SLO", "mean ms/token", "p99 ms/token")
    return tables.markdown(head, lines, "lrlr") + "\n"


def checked(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the check against the engine's replicas."""
    head = ("placement", "rate", "mean ms/token here", "by the engine's replicas", "off")
    return tables.markdown(head, [
        [row["placement"], f"{row['rate']:g}", f"{row['mean_ms']:.2f}", f"{row['engine_mean_ms']:.2f}",
         f"{row['mean_ms'] / row['engine_mean_ms'] - 1:+.1%}"]
        for row in rows
    ], "lr") + "\n"  # fmt: skip


def draw_distributions(path: Path, rows: Sequence[Mapping[str, Any]], rate: float) -> None:
    """Draw figure 19's distributions of the time per token at a rate, a panel for each kernel."""
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    colour = colours(row["placement"] for row in rows)
    figure, (axes,) = new_figure((4.2 * len(names), 4.0), 1, len(names))
    for axis, kernel in zip(axes, names):
        for name in colour:
            group = [
                row["cdf_ms"] for row in rows if (row["kernel"], row["rate"], row["placement"]) == (kernel, rate, name)
            ]
            axis.plot(np.mean(group, axis=0), np.array(SHARES) / 100, label=name, color=colour[name])
        axis.axvline(next(row["slo_ms"] for row in rows if row["kernel"] == kernel), color="black", linestyle="--")
        axis.set_title(f"kernels: {kernel}, {rate:g} requests/s")
        axis.set_xlabel("ms per token, queueing included")
        axis.set_xlim(0, 2.5 * next(row["slo_ms"] for row in rows if row["kernel"] == kernel))
        axis.set_ylim(0, 1)
    axes[0].set_ylabel("share of requests")
    legend(figure, axes, columns=4)
    save(figure, path, KINDS)
