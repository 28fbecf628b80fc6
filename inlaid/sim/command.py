"""`inlaid sim`: workloads under policies on the simulator, with tables, records and figures.

The command line program calls add_arguments and run; `python -m inlaid.sim.command` works too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from inlaid.cluster.placement import PLACEMENTS
from inlaid.engine.policy import parse_policy
from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.report.plots import PlotsMissing, new_figure
from inlaid.report.provenance import provenance
from inlaid.sim import cluster_sweep, oversubscription, placement_sweep
from inlaid.sim.cost import machine_facts
from inlaid.sim.experiment import Experiment, bound, prepare, table
from inlaid.sim.experiment import run as run_policy
from inlaid.sim.plot import draw_bars, draw_lines, draw_suite
from inlaid.sim.report import file_name, markdown, write_records, write_table
from inlaid.sim.simulate import make_lengths
from inlaid.workload.arrivals import Arrivals
from inlaid.workload.functions import read as read_functions
from inlaid.workload.lengths import Lengths
from inlaid.workload.popularity import AdapterChoice
from inlaid.workload.spec import Stream, Workload
from inlaid.workload.suites import known_suites, load_suite, suite_names
from inlaid.workload.traces import Trace

REAL = "real"
PLACEMENT = placement_sweep.NAME  # many replicas: not a workload under policies, so not among the suites
OVERSUBSCRIPTION = "oversubscription"  # many numbers of adapters, likewise
SWEEPS = (PLACEMENT, OVERSUBSCRIPTION, cluster_sweep.NAME)
FORMER_NAMES = MappingProxyType({"cliff": OVERSUBSCRIPTION})  # results recorded earlier name their commands so
SEED = 42


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `inlaid sim`."""
    parser.add_argument(
        "--suite", default="overload", help=f"comma-separated, or all; {known_suites()}; sweeps: {', '.join(SWEEPS)}"
    )
    parser.add_argument(
        "--policy", default="fcfs,vtc", help="semicolon- or comma-separated; options as in vtc:predict=oracle"
    )
    parser.add_argument("--lengths", default="history", help="what policies know: history, none, oracle, noisy:0.5")
    parser.add_argument(
        "--machine", default="", help="a10g, a100-13b, h100, h200, or a file from inlaid.sim.fit; default: the suite's"
    )
    parser.add_argument("--num-tokens", type=int, default=0, help="KV memory in tokens; default: the suite's")
    parser.add_argument(
        "--kv-cache-dtype", default="auto", help="auto (16 bits), fp8 or int8: more tokens in that memory, read faster"
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        help="machines that serve one model together, each with its share",
    )
    parser.add_argument(
        "--exchange-ms",
        type=float,
        default=0.75,
        help="with it, milliseconds that the sums of a step take; 0.75: 65 of NCCL between two H200s, up to 16 rows",
    )
    parser.add_argument("--seed", type=int, help="of the workload's draws; default: the suite's")
    parser.add_argument(
        "--trace",
        type=Path,
        help="for suite real: JSONL of [seconds, tenant, prompt tokens, output tokens], or a published trace; for "
        "placement: a day of Azure's functions (invocations_per_function_md….csv)",
    )
    parser.add_argument("--out", type=Path, help="folder for records, tables and figures; default: the table on screen")
    parser.add_argument("--no-figures", action="store_true", help="with --out: records and tables alone")


def run(args: argparse.Namespace) -> int:
    """Run the command; return 0, or 2 with a sentence on standard error when an argument is wrong."""
    try:
        names = [*suite_names(), *SWEEPS] if args.suite == "all" else args.suite.split(",")
        names = [FORMER_NAMES.get(name, name) for name in names]
        policies = split_policies(args.policy)
        for policy in policies:
            parse_policy(policy)
        make_lengths(args.lengths, 0)
        is_placed = args.trace is not None and PLACEMENT in names
        args.functions = read_functions(args.trace, 60) if is_placed else None
        experiments = [_prepare(name, args) for name in names if name not in SWEEPS]
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"inlaid sim: {error}", file=sys.stderr)
        return 2
    args.figures = _can_draw(args)
    for experiment in experiments:
        rows = _run_one(experiment, policies, args)
        print(f"\n{experiment.workload.name}: {experiment.workload.about}\n\n{markdown(rows)}")
    if PLACEMENT in names:
        _run_placement(args)
    if OVERSUBSCRIPTION in names:
        _run_oversubscription(args)
    if cluster_sweep.NAME in names:
        _run_cluster(args)
    return 0


def _can_draw(args: argparse.Namespace) -> bool:
    """Tell whether figures are wanted and can be drawn; without matplotlib, say so in a line and go on."""
    if args.out is None or args.no_figures:
        return False
    try:
        new_figure((1.0, 1.0))
    except PlotsMissing as error:
        print(f"inlaid sim: no figures are drawn: {error}", file=sys.stderr)
        return False
    return True


def _run_oversubscription(args: argparse.Namespace) -> None:
    """Simulate every mode, with more and more adapters for the same places."""
    workload = load_suite(oversubscription.SUITE)
    machine = args.machine or workload.simulator.machine
    manifest = provenance(workload.seed if args.seed is None else args.seed)
    rows = oversubscription.compare(machine, manifest["seed"], workload)
    text = oversubscription.markdown(rows)
    print(f"\n{OVERSUBSCRIPTION}: {oversubscription.ABOUT}\n\n{text}")
    if args.out is None:
        return
    _write_sweep(args.out, OVERSUBSCRIPTION, oversubscription.ABOUT, {**manifest, "machine": machine}, rows, text)
    if args.figures:
        for key, label in (("ttft_p50_ms", "median"), ("ttft_p99_ms", "p99")):
            title, axes = f"{label} time to first token, {machine}", ("adapters per place", "ms")
            draw_lines(args.out / f"{OVERSUBSCRIPTION}-{label}", title, axes, oversubscription.lines(rows, key))


def _write_sweep(
    folder: Path, name: str, about: str, manifest: dict[str, Any], rows: list[dict[str, Any]], text: str
) -> None:
    (folder / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode({**manifest, "rows": rows})))
    made = f"Made by `{manifest['command']}` at {manifest['commit']}."
    (folder / f"{name}.md").write_text(f"# {name}\n\n{about}. {made}\n\n{text}")


def _run_placement(args: argparse.Namespace) -> None:
    """Simulate every way of choosing a replica, at several loads, under each kind of kernel."""
    first_seed, machine = SEED if args.seed is None else args.seed, args.machine or placement_sweep.MACHINE
    compared = placement_sweep.kernels(machine)
    jobs = [(kernel, rate) for kernel in compared.values() for rate in placement_sweep.RATES]
    rows = []
    for kernel, rate in Bar(jobs, desc=PLACEMENT, leave=False):
        for seed in range(first_seed, first_seed + placement_sweep.SEEDS):
            rows += placement_sweep.compare(rate, seed, kernel, args.functions)
    check = [
        row
        for rate in placement_sweep.RATES
        for row in placement_sweep.check(machine, rate, first_seed, args.functions)
    ]
    held_out = {name: value for name, value in machine_facts(machine).items() if name.startswith("held_out")}
    text = f"{placement_sweep.markdown(rows)}\nThe same calls on replicas of the real engine, {machine}:\n\n"
    text += placement_sweep.checked(check)
    print(f"\n{PLACEMENT}: {placement_sweep.ABOUT}\n\n{text}")
    if args.out is None:
        return
    manifest = {**provenance(first_seed), "machine": machine, **held_out, "check": check}
    _write_sweep(args.out, PLACEMENT, placement_sweep.ABOUT, manifest, rows, text)
    if args.figures:
        for name, kernel in compared.items():
            bars = placement_sweep.attainments([row for row in rows if row["kernel"] == name])
            title = f"share within {1e3 * kernel.slo:.3g} ms per token, {name} kernels"
            draw_bars(args.out / f"{PLACEMENT}-{name}", title, "SLO attainment", bars)
        placement_sweep.draw_distributions(args.out / f"{PLACEMENT}-distributions", rows, placement_sweep.RATES[-1])


def _run_cluster(args: argparse.Namespace) -> None:
    """Simulate replicas of the real engine under every placement."""
    first_seed = SEED if args.seed is None else args.seed
    machine = args.machine or cluster_sweep.MACHINE
    jobs = [(zipf, rate) for zipf in cluster_sweep.ZIPFS for rate in cluster_sweep.RATES]
    rows = []
    for zipf, rate in Bar(jobs, desc=cluster_sweep.NAME, leave=False):
        for seed in range(first_seed, first_seed + cluster_sweep.SEEDS):
            names = PLACEMENTS if seed == first_seed else (cluster_sweep.RAYS, cluster_sweep.OURS)
            rows += cluster_sweep.compare(machine, rate, zipf, seed, names)
    text = cluster_sweep.markdown(rows)
    print(f"\n{cluster_sweep.NAME}: {cluster_sweep.ABOUT}\n\n{text}")
    if args.out is None:
        return
    manifest = {**provenance(first_seed), "machine": machine}
    _write_sweep(args.out, cluster_sweep.NAME, f"On {machine}: {cluster_sweep.ABOUT}", manifest, rows, text)
    if args.figures:
        for key, label in (("ttft_p99_ms", "p99 time to first token, ms"), ("loads", "adapter loads")):
            title = f"{label}: 8 replicas, 1,000 adapters, {machine}"
            name = f"{cluster_sweep.NAME}-{key.partition('_')[0]}"
            draw_bars(args.out / name, title, label, cluster_sweep.bars(rows, key))


def split_policies(text: str) -> list[str]:
    """Split at commas and semicolons; a part written key=value belongs to the policy before it."""
    policies: list[str] = []
    for part in text.replace(";", ",").split(","):
        if "=" in part and ":" not in part and policies:
            policies[-1] += "," + part
        elif part:
            policies.append(part)
    return policies


def _prepare(name: str, args: argparse.Namespace) -> Experiment:
    workload = load_suite(name)
    if args.trace is not None and name == REAL:
        workload = replay_trace(workload, args.trace)
    members = args.tensor_parallel_size
    if members < 1:
        raise ValueError(f"--tensor-parallel-size {members}: give 1 or more")
    return prepare(
        workload,
        args.seed,
        args.machine,
        args.num_tokens,
        kv=args.kv_cache_dtype,
        members=members,
        exchanges=args.exchange_ms / 1e3,
    )


def replay_trace(workload: Workload, path: Path) -> Workload:
    """Replace a workload's requests by those of a trace file, of any format that `workload.traces` reads."""
    stream = Stream(
        arrival=Arrivals("trace"),
        adapters=AdapterChoice("none"),
        input=Lengths("trace"),
        output=Lengths("trace"),
        tenant="{tenant}",
        trace=Trace(str(path)),
    )
    return msgspec.structs.replace(workload, bursty=None, streams=[stream], duration_s=None)


def _run_one(experiment: Experiment, policies: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    outcomes = []
    workload = experiment.workload
    manifest = {
        **provenance(workload.seed),
        "suite": workload.name,
        "machine": experiment.setup.cost.name,
        "num_tokens": experiment.setup.num_tokens,
        "lengths": args.lengths,
    }
    for policy in policies:
        title = f"{workload.name} {policy}"
        with Bar(total=len(experiment.trace), desc=title, unit=" requests", leave=False) as bar:
            outcomes.append(run_policy(experiment, policy, args.lengths, bar.update))
        if args.out is not None:
            path = args.out / f"{workload.name}-{file_name(policy)}.jsonl"
            write_records(path, {**manifest, "policy": policy}, outcomes[-1])
    rows = table(experiment, outcomes)
    if args.out is not None:
        write_table(args.out, workload.name, workload.about, manifest, rows)
        if args.figures:
            limit = bound(experiment) if workload.simulator.fairness else None
            title = f"{workload.name}: {workload.about}"
            draw_suite(args.out / workload.name, title, outcomes, experiment.duration, limit)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="inlaid sim", description="Run scheduling experiments on the simulator.")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
