"""VTC's `run_exp.py`: a suite of its workloads against a live server, or all of them under many policies, with figures.

    python -m perf.run_exp --suite overload --output VTC/all_results_overload.jsonl      # as the artifact has it
    python -m perf.run_exp --suite all --policies default --out .inlaid/vtc --figures    # hours; may be resumed
    python -m perf.run_exp --suite overload,increase --policies default --out .inlaid/vtc-sim --figures --simulate

The second form switches the server's policy between runs and skips runs whose results are there. Figures are drawn by
the same code from a server's records and from the simulator's. Clients are the suite's tenants. `perf.launch_server`
starts a server for it; any other needs `--tenant user` and the admin key of INLAID_ADMIN_KEY (default: vtc).
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from inlaid.files import write_atomically
from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.sim import experiment
from inlaid.sim.report import file_name
from inlaid.sim.simulate import Outcome
from inlaid.workload.suites import known_suites, load_suite
from perf import client
from perf.launch_server import admin_key
from perf.records import Record
from perf.vtc_figures import draw_page, outcome_of

POLICIES = (
    "fcfs", "lcf", "vtc", "vtc:predict=predicted", "vtc:predict=oracle", "drr",
    "rpm:limit=5", "rpm:limit=10", "rpm:limit=15", "rpm:limit=20",
)  # fmt: skip
SUITES = (
    "overload", "proportional", "on_off_less", "on_off_overload", "poisson_short_long", "poisson_short_long_2",
    "increase", "dist_shift", "real", "overload-weighted", "ablation_lshare",
)  # fmt: skip
S4 = ("overload-s4-35000-256", "overload-s4-35000-512", "overload-s4-35000-768", "overload-s4-long")


def suites_of(text: str, setting: str) -> list[str]:
    """Return the suites that a flag names; `all`: those of the artifact for this model."""
    if text == "all":
        return list(S4 if setting == "S4" else SUITES)
    return [name for name in text.split(",") if name]


def run_one(server: str, suite: str, policy: str | None, out: Path, more: Sequence[str]) -> int:
    """Send a suite to a server; write a summary to `out` and the requests beside it, one line of JSON each."""
    command = ["--base-url", server, "--workload", suite, "--out", str(out), "--label", out.stem]
    command += ["--timeout", "10800", "--ready-timeout", "600"]
    return client.main([*command, *(["--policy", policy] if policy else []), *more])


def as_the_artifact(server: str, suite: str, output: Path, append: bool, more: Sequence[str]) -> int:
    """Run a suite under the server's own policy; `output` gets a line of JSON for each request. What it held stays as
    it is until the run is over."""
    running = output.with_name(f"{output.stem}.running.json")
    code = run_one(server, suite, None, running, more)
    records = running.with_suffix(".jsonl")
    if records.exists():
        before = output.read_bytes() if append and output.exists() else b""
        write_atomically(output, before + records.read_bytes())
        records.unlink()
    if running.exists():
        running.replace(output.with_suffix(".json"))
    return code


def measured(server: str, suite: str, policy: str, out: Path, more: Sequence[str]) -> Outcome | None:
    """Return what a run found, taken now unless its files are there; None: it failed."""
    file = out / Path(suite).stem / f"{file_name(policy)}.json"
    if not file.exists() and run_one(server, suite, policy, file, more):
        return None
    lines = file.with_suffix(".jsonl").read_bytes().splitlines()
    return outcome_of([msgspec.json.decode(line, type=Record) for line in lines], policy)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="perf.run_exp", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", default="overload", help=f"names with commas between, or all; {known_suites()}")
    parser.add_argument(
        "--model-setting", default="S1", choices=("S1", "S4", "Real"), help="S4: all is the 13B's suites"
    )
    parser.add_argument("--output", type=Path, help="records of one suite, one line of JSON each")
    parser.add_argument("--append", action="store_true", help="add to --output instead of replacing it")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="address of the server")
    parser.add_argument("--policies", help="semicolon-separated, or default: those of the paper")
    parser.add_argument("--out", type=Path, help="folder of the results of --policies")
    parser.add_argument("--simulate", action="store_true", help="on the simulator, at the suites' own settings")
    parser.add_argument("--figures", action="store_true", help="draw the paper's figures, and a page of them")
    args, more = parser.parse_known_args(argv)  # what is left goes to perf.client
    suites = suites_of(args.suite, args.model_setting)
    if (args.output is None) == (args.out is None):
        parser.error("name --output FILE for one suite, or --out FOLDER with --policies for many")
    try:
        loaded = {suite: load_suite(suite) for suite in suites}
    except (ValueError, FileNotFoundError) as error:
        parser.error(f"--suite: {error}")
    more = ["--api-key", admin_key(), *more]
    if args.output is not None:
        if len(suites) != 1 or args.policies or args.figures or args.simulate:
            parser.error("--output is for one suite under the server's policy; use --out with the other flags")
        return as_the_artifact(args.server, suites[0], args.output, args.append, more)
    policies = POLICIES if args.policies in (None, "default") else tuple(args.policies.split(";"))
    found: dict[str, list[Outcome]] = {}
    failed: list[str] = []
    for suite, policy in Bar(list(itertools.product(suites, policies)), desc="suites under policies"):
        if args.simulate:
            outcome: Outcome | None = experiment.run(experiment.prepare(loaded[suite]), policy)
        else:
            outcome = measured(args.server, suite, policy, args.out, more)
        if outcome is None:
            failed.append(f"{suite} under {policy}")
        else:
            found.setdefault(loaded[suite].name, []).append(outcome)
    if args.figures:
        workloads = {workload.name: workload for workload in loaded.values()}
        page = draw_page(args.out, found, workloads, "the simulator" if args.simulate else args.server)
        print(page)
    print(json.dumps({"runs": sum(map(len, found.values())), "failed": failed}))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
