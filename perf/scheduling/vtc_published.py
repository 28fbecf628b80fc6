"""VTC's suites on our simulator beside the figures recomputed from VTC's published artifact, differences explained.

    inlaid sim --suite overload,on_off_less,... --policy vtc,fcfs,... --out FOLDER
    python -m perf.scheduling.vtc_published --new FOLDER --out perf/results

What `inlaid sim` wrote to FOLDER is kept as sim-<suite>.* without the records, and the tables are made from all that is
kept. The trace of the `real` suite is drawn, so its figures are means over several, served here, by our scheduler and
by ours with the artifact's way of admitting (vtc_admission.py) on a machine of the artifact's speed.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.report.provenance import provenance
from inlaid.report.tables import markdown
from inlaid.sim.experiment import prepare, run
from inlaid.sim.metrics import summarize
from inlaid.workload.suites import load_suite, suite_names
from perf.scheduling.vtc_admission import with_vtc_admission

# From the artifact's shipped records: policy -> (max, avg, var of the difference, tokens per second, refused).
REAL = MappingProxyType(
    {
        "fcfs": (759.97, 433.53, 32112, 777, 0),
        "lcf": (750.49, 323.82, 29089, 778, 0),
        "rpm:limit=5": (143.86, 83.58, 1020, 340, 919),
        "rpm:limit=10": (217.65, 128.24, 2767, 532, 600),
        "rpm:limit=15": (343.07, 161.06, 5189, 626, 447),
        "rpm:limit=20": (446.76, 195.71, 7450, 694, 342),
        "rpm:limit=30": (693.66, 309.45, 24221, 747, 176),
        "vtc": (368.40, 251.66, 6549, 779, 0),
        "vtc:predict=predicted": (365.47, 240.33, 5322, 773, 0),
        "vtc:predict=oracle": (329.46, 227.51, 4476, 781, 0),
    }
)
OVERLOAD = MappingProxyType({"fcfs": (447.0, 439.0), "vtc": (193.0, 104.0), "vtc:predict=oracle": (5.9, 0.5)})
GAPS = MappingProxyType(
    {  # largest accumulated gap, VTC and FCFS
        "overload": (7_700, 249_000),
        "poisson_short_long": (18_000, 212_000),
        "poisson_short_long_2": (41_000, 325_000),
        "on_off_overload": (8_800, 371_000),
        "overload-s4-35000-256": (32_000, None),
        "overload-s4-35000-512": (52_000, None),
        "overload-s4-35000-768": (52_000, None),
        "overload-s4-long": (96_000, None),
    }
)
TTFTS = (  # mean time to first token of the modest clients: suite, client, policy, seconds
    ("on_off_less", "client-0", "vtc", 3.5),
    ("on_off_less", "client-0", "fcfs", 85.0),
    ("proportional", "client-0", "vtc", 4.8),
    ("proportional", "client-1", "vtc", 4.9),
    ("proportional", "client-2", "vtc", 124.0),
)

SPEED = 1.13  # at which our profile of an A10G makes as many tokens per second as the artifact's machine did
FIGURES = ("max_difference", "mean_difference", "variance_difference", "throughput", "refused")
WAYS = ("ours", "like the artifact")

NOTES = """
Why the numbers differ where they do:
- **Rounds.** The artifact tries to admit every ten decode steps, and by the most memory that will ever be held
  together. Answers of one length then fall into step, and requests are admitted in rounds (on `overload` of 12, 7 and
  1), all of one client and then all of the other, as counters that are charged token by token do not see a round that
  has just started. With that rule alone our VTC has the artifact's swing, and charging ahead ends it here as there.
  Ours admits at every step, so nothing falls into step, and little is left for predicted or oracle lengths to mend.
  The wait for the next round is also why the artifact's modest clients wait seconds where ours wait half of one.
- **Lift.** The artifact lifts a tenant that comes back to the lowest counter of those that wait. Charged ahead, that
  counter holds service which is still to come, and the tenant, with nothing in the batch, stays behind by as much: with
  this lift known lengths made our VTC worse (223 for 196, with the
  artifact's rules 245 for 232). Ours lifts to what others were delivered and it paid ahead itself: 211, and 237.
- **Trace.** The published trace's arrival times are not available. Ours are drawn so that the limits of requests per
  minute refuse as many as they did there. Before that bursts were small and many, LCF's tenants had no idle time to
  save credit from, and LCF came out beside predicted VTC; with the published refusals it is as bad as in the artifact.
- **Speed.** A full machine is 10% slower here on long answers than the artifact's (tokens per second), so queues are
  longer and FCFS's differences larger; the second column is at the artifact's speed.
- What still changes places with the artifact's rules and speed (RPM 20 and the VTCs, RPM 30 and LCF, the VTCs among
  each other) does so from trace to trace: the artifact's figures are of one trace, and the ranges overlap.
- The artifact's VTC also charges a token too many to everyone left in a batch whenever one finishes; ours charges each
  token once. It lets a request in only if its longest answer fits; here a share of the predicted answer must fit, and
  running requests may be preempted.
"""


def load(folder: Path, suite: str) -> dict[str, dict[str, Any]]:
    """Read the suite's rows by policy; nothing if it was not run."""
    path = folder / f"sim-{suite}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["policy"]: row for row in rows if "policy" in row}


def serve(suite: str, policy: str, way: str, seeds: Sequence[int], speed: float) -> dict[str, Any]:
    """Average over traces, with each trace's mean difference."""
    rows = []
    for seed in seeds:
        experiment = prepare(load_suite(suite), seed)
        if way != "ours":
            experiment = with_vtc_admission(experiment, speed)
        rows.append(summarize(run(experiment, policy), experiment.duration, None, {}))
    means = {key: statistics.fmean(row[key] for row in rows) for key in FIGURES}
    return {
        "suite": suite,
        "policy": policy,
        "way": way,
        **means,
        "by_trace": [row["mean_difference"] for row in rows],
        "largest_gap": max(row["largest_gap"] for row in rows),
        "mean_ttft": {tenant: figures["mean_ttft"] for tenant, figures in rows[0]["tenants"].items()},
    }


def served(num_seeds: int, only: Collection[str] = (), kept: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Serve every policy on the real-shaped trace, and the VTCs on overload, in both ways.

    Suites of which the artifact has other figures are served in its way only. With `only` these policies are served,
    and the rows of others are those `kept`.
    """
    seeds = range(42, 42 + num_seeds)
    jobs = [("real", policy, way, seeds, SPEED) for policy in REAL for way in WAYS]
    jobs += [("overload", policy, way, seeds[:1], 1.0) for policy in OVERLOAD for way in WAYS]
    suites = {*GAPS, *(row[0] for row in TTFTS)} - {"overload"}
    others = {*((suite, "vtc") for suite in suites), ("on_off_less", "fcfs")}
    jobs += [(suite, policy, WAYS[1], seeds[:1], 1.0) for suite, policy in sorted(others)]
    known = {(row["suite"], row["policy"], row["way"]): row for row in kept if only and row["policy"] not in only}
    return [known.get(job[:3]) or serve(*job) for job in Bar(jobs, desc="both ways")]


def real_table(rows: Sequence[dict[str, Any]]) -> str:
    found = {(row["policy"], row["way"]): row for row in rows if row["suite"] == "real"}
    titles = ("avg diff", "max diff", "diff var", "tok/s", "refused")
    head = ["policy", *(cell for title in titles for cell in (title, "artifact's rules", "artifact")), "avg by trace"]
    lines = []
    for policy, (most, mean, variance, *rest) in REAL.items():
        ours, like = (found[policy, way] for way in WAYS)
        keys = ("mean_difference", "max_difference", *FIGURES[2:])
        cells = [
            f"{figure:.0f}"
            for key, theirs in zip(keys, (mean, most, variance, *rest))
            for figure in (ours[key], like[key], theirs)
        ]
        ranges = [f"{min(row['by_trace']):.0f}-{max(row['by_trace']):.0f}" for row in (ours, like)]
        lines.append([policy, *cells, ", ".join(ranges)])
    return markdown(head, lines, "l" + "r" * 15 + "l")


def overload_table(rows: Sequence[dict[str, Any]]) -> str:
    found = {(row["policy"], row["way"]): row for row in rows if row["suite"] == "overload"}
    lines = []
    for policy, (most, mean) in OVERLOAD.items():
        pairs = [[found[policy, way][key] for key in ("max_difference", "mean_difference")] for way in WAYS]
        cells = [f"{largest:.0f} / {average:.0f}" for largest, average in pairs]
        lines.append([policy, *cells, f"{most:g} / {mean:g}"])
    return markdown(("policy", "ours", "artifact's rules", "artifact"), lines)


def gap_table(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    like = {row["suite"]: row["largest_gap"] for row in rows if (row["policy"], row["way"]) == ("vtc", WAYS[1])}
    lines = []
    for suite in suite_names():
        kept = load(folder, suite)
        if "vtc" not in kept or kept["vtc"]["bound"] is None:
            continue
        vtc, fcfs = kept["vtc"], kept["fcfs"]
        theirs = GAPS.get(suite, (None, None))
        lines.append(
            [
                suite,
                f"{vtc['largest_gap']:,.0f}",
                f"{like[suite]:,.0f}" if suite in like else "-",
                "-" if theirs[0] is None else f"{theirs[0]:,}",
                f"{fcfs['largest_gap']:,.0f}",
                "-" if theirs[1] is None else f"{theirs[1]:,}",
                f"{vtc['bound']:,.0f}",
                "yes" if vtc["largest_gap"] <= vtc["bound"] else "NO",
            ]
        )
    head = ("suite", "VTC gap", "artifact's rules", "artifact", "FCFS gap", "artifact", "VTC's bound", "within")
    return markdown(head, lines, "lrrrrrrl")


def ttft_table(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    like = {(row["suite"], row["policy"]): row["mean_ttft"] for row in rows if row["way"] == WAYS[1]}
    lines = []
    for suite, client, policy, theirs in TTFTS:
        ours = load(folder, suite)[policy]["tenants"][client]["mean_ttft"]
        lines.append([suite, client, policy, f"{ours:.1f}", f"{like[suite, policy][client]:.1f}", theirs])
    return markdown(("suite", "client", "policy", "mean TTFT s", "artifact's rules", "artifact"), lines, "lllr")


def keep(new: Path, results: Path) -> None:
    """Take over what `inlaid sim` wrote, without the records."""
    for path in sorted(new.iterdir()):
        if path.suffix in (".json", ".md", ".png"):
            shutil.copyfile(path, results / f"sim-{path.name}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--new", type=Path, help="a folder that `inlaid sim --out` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--policy", default="", help="serve these only (comma-separated), and keep others' rows")
    args = parser.parse_args(arguments)
    if args.new is not None:
        keep(args.new, args.out)
    file = args.out / "sim-vtc-artifact.json"
    kept = json.loads(file.read_text())["rows"] if args.policy else []
    made, rows = provenance(seed=42), served(args.seeds, list(filter(None, args.policy.split(","))), kept)
    record = {**made, "speed": SPEED, "rows": rows}
    file.write_text(json.dumps(record, indent=1) + "\n")
    text = "\n".join(
        [
            "# Fairness suites beside VTC's artifact (simulated)\n",
            f"Made by `{made['command']}` at {made['commit']}; the artifact's columns come from its records.\n",
            f"## The real-shaped trace (1,500 requests, 27 clients): means over {args.seeds} traces\n",
            real_table(rows),
            "\n## Overload, two clients: difference, max / avg\n",
            overload_table(rows),
            "\n## Largest gap in service between two clients that both waited\n",
            "The artifact's column is its accumulated difference, over other durations for FCFS.\n",
            gap_table(args.out, rows),
            "\n## Waiting of single clients\n",
            ttft_table(args.out, rows),
            NOTES,
        ]
    )
    (args.out / "sim-vtc-artifact.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
