"""LoRA-Inlaid's claims on the simulator: attainment and latency near saturation, the ablation, misprediction.

At light load every order is the same; the question is which requests wait when a hundred tasks ask for a little
more than the machine gives. The suite's trace is served at rates around capacity (about 6.2 requests per second on this
machine); SLO is 12 s from arrival to last token.

    python -m perf.scheduling.claims --out perf/results
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inlaid.engine.policy import parse_policy
from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.report.provenance import provenance
from inlaid.report.tables import markdown
from inlaid.sim.experiment import Experiment, prepare, run
from inlaid.sim.metrics import summarize
from inlaid.sim.plot import draw_lines
from inlaid.workload.plan import rescale_rate
from inlaid.workload.spec import Workload
from inlaid.workload.suites import load_suite

ABLATION = (  # what is left out, policy, lengths
    ("all of inlaid", "inlaid", "history"),
    ("no limit on tasks", "inlaid:beta=1000", "history"),
    ("no prediction", "inlaid", "none"),
    ("no shortest-first", "inlaid:seniority=0", "history"),
    ("beta 10", "inlaid:beta=10", "history"),
    ("no ageing", "inlaid:ageing=0", "history"),
    ("no seniority", "inlaid:seniority=1000000", "history"),
    ("fcfs", "fcfs", "history"),
)
SENIORITY = (0, 30, 60, 120, 1_000_000)  # seconds in which later requests may overtake one; 60 is the default
BOUND_RATES = (6.5, 7.0)
NOISE = ("oracle", "noisy:0.5", "noisy:2.0", "history", "none")


def row(suite: Workload, rate: float, policy: str, lengths: str, seed: int) -> dict[str, Any]:
    """Simulate once and return the figures."""
    experiment: Experiment = prepare(rescale_rate(suite, rate), seed)
    figures = summarize(run(experiment, policy, lengths), experiment.duration, None, {})
    kept = ("slo_attainment", "mean_latency", "mean_ttft", "p99_ttft", "max_ttft", "throughput", "adapter_loads")
    return {
        "suite": suite.name,
        "rate": rate,
        "policy": policy,
        "lengths": lengths,
        "seed": seed,
        **{k: figures[k] for k in kept},
    }


def mean_rows(suite: Workload, rate: float, policy: str, lengths: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Average over seeds, with each attainment beside the mean."""
    rows = [row(suite, rate, policy, lengths, seed) for seed in seeds]
    numbers = {k: statistics.fmean(r[k] for r in rows) for k, v in rows[0].items() if isinstance(v, (int, float))}
    return {**rows[0], **numbers, "attainments": [round(r["slo_attainment"], 4) for r in rows], "seed": list(seeds)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for sim-tasks.json, .md and .png")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(arguments)
    seeds = list(range(42, 42 + args.seeds))
    suite = load_suite("tasks-100")
    jobs = [
        ("load", suite, rate, policy, "history") for rate in (5.5, 6.0, 6.5, 7.0, 7.5) for policy in ("fcfs", "inlaid")
    ]
    jobs += [("ablation", suite, 6.5, policy, lengths) for _, policy, lengths in ABLATION]
    jobs += [
        ("seniority", suite, rate, f"inlaid:seniority={seconds},beta={beta}", "history")
        for rate in BOUND_RATES
        for beta, seconds in (*((32, seconds) for seconds in SENIORITY), (10, 60), (10, 1_000_000))
    ]
    jobs += [("noise", suite, 6.5, "inlaid", lengths) for lengths in NOISE]
    jobs += [
        ("tasks", load_suite(f"tasks-{count}"), 6.5, policy, "history")
        for count in (2, 10, 50, 100, 500, 1000)
        for policy in ("fcfs", "inlaid")
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for group, which, rate, policy, lengths in Bar(jobs, desc="claims"):
        groups.setdefault(group, []).append(mean_rows(which, rate, policy, lengths, seeds))
    made = provenance(seed=42)
    (args.out / "sim-tasks.json").write_text(json.dumps({**made, **groups}, indent=1) + "\n")
    (args.out / "sim-tasks.md").write_text(report(made, groups))
    lines = {
        policy: [(r["rate"], r["slo_attainment"]) for r in groups["load"] if r["policy"] == policy]
        for policy in ("fcfs", "inlaid")
    }
    draw_lines(args.out / "sim-tasks", "100 tasks: SLO attainment (12 s)", ("requests per second", "attainment"), lines)
    return 0


def report(made: dict[str, Any], groups: dict[str, list[dict[str, Any]]]) -> str:
    """Format the tables."""
    names = {(policy, lengths): name for name, policy, lengths in ABLATION}
    parts = [
        "# Many tasks near saturation (simulated)\n",
        f"Made by `{made['command']}` at {made['commit']}: A10G profile, 32 adapter slots, at most 128 running,",
        f"Zipf tasks, SLO 12 s to the last token, means over seeds {groups['load'][0]['seed']}.\n",
        "## Load (100 tasks)\n",
        _table(groups["load"], ("rate", "policy")),
        *_ratios(groups["load"]),
        "\n## Ablation (100 tasks, 6.5 requests per second)\n",
        _table([{**r, "variant": names[r["policy"], r["lengths"]]} for r in groups["ablation"]], ("variant",)),
        "\n## What a bound on waiting costs (100 tasks)\n",
        "Later requests overtake one in its first `seniority` seconds only. The bound is that and the longest wait",
        "under fcfs, as from then on it waits for earlier ones only.\n",
        _table(_with_bounds(groups), ("rate", "policy", "bound s")),
        "\n## Misprediction (inlaid, same load)\n",
        _table(groups["noise"], ("lengths",)),
        "\n## Number of tasks (6.5 requests per second)\n",
        _table(groups["tasks"], ("suite", "policy")),
    ]
    return "\n".join(parts) + "\n"


def _with_bounds(groups: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join fcfs at each rate and inlaid for each bound on overtaking, with the bound on waiting."""
    rows = []
    for rate in BOUND_RATES:
        (fcfs,) = (r for r in groups["load"] if r["policy"] == "fcfs" and r["rate"] == rate)
        rows.append({**fcfs, "bound s": "-"})
        for row in groups["seniority"]:
            if row["rate"] == rate:
                seconds = parse_policy(row["policy"]).seniority_s
                rows.append({**row, "bound s": f"{seconds + fcfs['max_ttft']:.0f}" if seconds < 1e6 else "none"})
    return rows


def _table(rows: Sequence[dict[str, Any]], keys: tuple[str, ...]) -> str:
    head = [*keys, "SLO", "mean latency s", "mean TTFT s", "p99 TTFT s", "longest TTFT s", "tok/s", "loads"]
    lines = []
    for r in rows:
        cells = [str(r[key]) for key in keys]
        cells += [f"{r['slo_attainment']:.1%}", *(f"{r[k]:.1f}" for k in ("mean_latency", "mean_ttft", "p99_ttft"))]
        cells += [f"{r['max_ttft']:.0f}", f"{r['throughput']:.0f}", f"{r['adapter_loads']:.0f}"]
        lines.append(cells)
    return markdown(head, lines, "l" * len(keys) + "r")


def _ratios(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for base, ours in zip(rows[::2], rows[1::2]):
        attained = ours["slo_attainment"] / max(base["slo_attainment"], 1e-9)
        faster = base["mean_latency"] / ours["mean_latency"]
        lines.append(
            f"\nAt {base['rate']:g} requests per second: SLO attainment {attained:.2f}x, mean latency {faster:.2f}x."
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
