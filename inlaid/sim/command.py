"""`inlaid sim`: suites under policies on the simulator, with tables, records and figures.

The command line program calls add_arguments and run; `python -m inlaid.sim.command` works too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from inlaid.engine.policy import parse_policy
from inlaid.report.provenance import provenance
from inlaid.sim import cliff, placement
from inlaid.sim.experiment import Experiment, bound, prepare, table
from inlaid.sim.experiment import run as run_policy
from inlaid.sim.journal import Arrival
from inlaid.sim.report import file_name, markdown, write_records, write_table
from inlaid.sim.simulate import make_lengths
from inlaid.sim.suites import SUITES, as_trace

TraceLine = tuple[float, str, int, int]
PLACEMENT = "placement"  # many instances: not a trace under policies, so not among the suites
CLIFF = "cliff"  # many numbers of adapters, likewise
OTHERS = (PLACEMENT, CLIFF)
PLACEMENT_RATES = (150.0, 200.0, 250.0, 300.0, 340.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `inlaid sim`."""
    parser.add_argument(
        "--suite", default="overload", help=f"comma-separated, or all; known: {', '.join((*SUITES, *OTHERS))}"
    )
    parser.add_argument(
        "--policy", default="fcfs,vtc", help="semicolon- or comma-separated; options as in vtc:predict=oracle"
    )
    parser.add_argument("--lengths", default="history", help="what policies know: history, none, oracle, noisy:0.5")
    parser.add_argument(
        "--machine", default="", help="a10g, a100-13b, h100, h200, or a file from inlaid.sim.fit; default: the suite's"
    )
    parser.add_argument("--num-tokens", type=int, default=0, help="KV memory in tokens; default: the suite's")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--trace", type=Path, help="JSONL of [seconds, tenant, prompt tokens, output tokens] for suite real"
    )
    parser.add_argument("--out", type=Path, help="folder for records, tables and figures; default: the table on screen")
    parser.add_argument("--no-figures", action="store_true")


def run(args: argparse.Namespace) -> int:
    """0, or 2 with a sentence on standard error when an argument is wrong."""
    try:
        names = [*SUITES, *OTHERS] if args.suite == "all" else args.suite.split(",")
        for name in names:
            if name not in SUITES and name not in OTHERS:
                raise ValueError(f"unknown suite {name!r}; known: {', '.join((*SUITES, *OTHERS))}")
        policies = split_policies(args.policy)
        for policy in policies:
            parse_policy(policy)
        make_lengths(args.lengths, args.seed)
        experiments = [_prepare(name, args) for name in names if name not in OTHERS]
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"inlaid sim: {error}", file=sys.stderr)
        return 2
    for experiment in experiments:
        rows = _run_one(experiment, policies, args)
        print(f"\n{experiment.suite.name}: {experiment.suite.about}\n\n{markdown(rows)}")
    if PLACEMENT in names:
        _run_placement(args)
    if CLIFF in names:
        _run_cliff(args)
    return 0


def _run_cliff(args: argparse.Namespace) -> None:
    """Every mode, with more and more adapters for the same places."""
    machine = args.machine or "h200"
    rows = cliff.compare(machine, args.seed)
    text = cliff.markdown(rows)
    print(f"\n{CLIFF}: {cliff.ABOUT}\n\n{text}")
    if args.out is None:
        return
    manifest = {**provenance(args.seed), "machine": machine}
    (args.out / f"{CLIFF}.json").write_bytes(msgspec.json.format(msgspec.json.encode({**manifest, "rows": rows})))
    made = f"Made by `{manifest['command']}` at {manifest['commit']}."
    (args.out / f"{CLIFF}.md").write_text(f"# {CLIFF}\n\n{cliff.ABOUT}. {made}\n\n{text}")
    if not args.no_figures:
        from inlaid.sim.plot import draw_lines

        for key, label in (("ttft_p50_ms", "median"), ("ttft_p99_ms", "p99")):
            title, axes = f"{label} time to first token, {machine}", ("adapters per place", "ms")
            draw_lines(args.out / f"{CLIFF}-{label}", title, axes, cliff.lines(rows, key))


def _run_placement(args: argparse.Namespace) -> None:
    """Every way of choosing an instance, at several loads, under both kinds of kernel."""
    jobs = [(kernel, rate) for kernel in placement.KERNELS.values() for rate in PLACEMENT_RATES]
    rows = []
    for kernel, rate in tqdm(jobs, desc=PLACEMENT, leave=False):
        for seed in (args.seed, args.seed + 1, args.seed + 2):
            rows += placement.compare(rate, seconds=20.0, seed=seed, kernel=kernel)
    text = placement.markdown(rows)
    print(f"\n{PLACEMENT}: {placement.ABOUT}\n\n{text}")
    if args.out is None:
        return
    manifest = provenance(args.seed)
    (args.out / f"{PLACEMENT}.json").write_bytes(msgspec.json.format(msgspec.json.encode({**manifest, "rows": rows})))
    made = f"Made by `{manifest['command']}` at {manifest['commit']}."
    (args.out / f"{PLACEMENT}.md").write_text(f"# {PLACEMENT}\n\n{placement.ABOUT}. {made}\n\n{text}")
    if not args.no_figures:
        from inlaid.sim.plot import draw_bars

        for kernel in placement.KERNELS:
            bars = placement.attainments([row for row in rows if row["kernel"] == kernel])
            title = f"share within {1e3 * placement.SLO:g} ms per token, {kernel} kernels"
            draw_bars(args.out / f"{PLACEMENT}-{kernel}", title, "SLO attainment", bars)


def split_policies(text: str) -> list[str]:
    """Names apart by commas or semicolons; a part written key=value belongs to the policy before it."""
    policies: list[str] = []
    for part in text.replace(";", ",").split(","):
        if "=" in part and ":" not in part and policies:
            policies[-1] += "," + part
        elif part:
            policies.append(part)
    return policies


def _prepare(name: str, args: argparse.Namespace) -> Experiment:
    trace = read_trace(args.trace) if args.trace is not None and name == "real" else None
    return prepare(SUITES[name], args.seed, args.machine, args.num_tokens, trace)


def _run_one(experiment: Experiment, policies: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    outcomes = []
    manifest = {
        **provenance(args.seed),
        "suite": experiment.suite.name,
        "machine": experiment.setup.cost.name,
        "num_tokens": experiment.setup.num_tokens,
        "lengths": args.lengths,
    }
    for policy in policies:
        title = f"{experiment.suite.name} {policy}"
        with tqdm(total=len(experiment.trace), desc=title, unit=" requests", leave=False) as bar:
            outcomes.append(run_policy(experiment, policy, args.lengths, bar.update))
        if args.out is not None:
            path = args.out / f"{experiment.suite.name}-{file_name(policy)}.jsonl"
            write_records(path, {**manifest, "policy": policy}, outcomes[-1])
    rows = table(experiment, outcomes)
    if args.out is not None:
        write_table(args.out, experiment.suite.name, experiment.suite.about, manifest, rows)
        if not args.no_figures:
            from inlaid.sim.plot import draw_suite

            limit = bound(experiment) if experiment.suite.fair else None
            title = f"{experiment.suite.name}: {experiment.suite.about}"
            draw_suite(args.out / experiment.suite.name, title, outcomes, experiment.suite.duration, limit)
    return rows


def read_trace(path: Path) -> list[Arrival]:
    """A trace of the user's: one JSON list per line, [seconds, tenant, prompt tokens, output tokens]."""
    lines: list[TraceLine] = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = msgspec.json.decode(text, type=TraceLine)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}; wanted [seconds, tenant, prompt, output]") from error
        if line[0] < 0 or line[2] < 1 or line[3] < 1:
            raise ValueError(f"{path}, line {number}: time must be >= 0 and lengths at least 1")
        lines.append(line)
    return as_trace(sorted(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="inlaid sim", description="Run scheduling experiments on the simulator.")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
