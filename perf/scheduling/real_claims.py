"""LoRA-Inlaid's claim on the real engine: `inlaid` against `fcfs`, a hundred adapters on the demo model, three loads.

Why it matters: the simulator shares the scheduler with the engine but not the machine. Lengths are hidden
from the scheduler (an answer is ended as a stop string would end it); the predictor learns while it serves. Time is
processor time of one thread, so other work on the machine does not disturb.

    python -m perf.scheduling.real_claims --out perf/results/scheduling-real-engine.json
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from inlaid.flags import Parser
from inlaid.report.provenance import provenance
from inlaid.sim.request_log import Arrival, as_arrivals
from inlaid.workload.plan import plan
from inlaid.workload.prompts import RandomTokens
from inlaid.workload.spec import Objective
from inlaid.workload.suites import load_workload
from perf.random_adapters import RandomAdapters, make_adapters
from perf.replay import Replay
from perf.validate import DEMO, load, serve

WORKLOAD = Path(__file__).with_name("demo-tasks.toml")
VOCABULARY = 1000  # random prompts use the demo's ids below this


def draw(names: Sequence[str], rate: float, seconds: float, slo: float, seed: int) -> list[Arrival]:
    """Draw the tasks' requests at a rate, with `slo` seconds from arrival to the last token."""
    workload = load_workload(str(WORKLOAD))
    assert workload.tasks is not None
    replaced = msgspec.structs.replace(
        workload,
        seed=seed,
        duration_s=seconds,
        classes={"default": Objective(e2el_ms=1000 * slo)},
        tasks=msgspec.structs.replace(workload.tasks, count=len(names), rate=rate),
    )
    return as_arrivals(plan(replaced, list(names), RandomTokens(VOCABULARY, seed)), names, real=True)


def figures(done: Replay) -> dict[str, float]:
    latencies = [record.latency for record in done.records if record.latency is not None]
    ttfts = [record.ttft for record in done.records if record.ttft is not None]
    met = sum(r.finish is not None and r.deadline is not None and r.finish <= r.deadline for r in done.records)
    return {
        "requests": len(done.records),
        "slo_attainment": met / len(done.records),
        "mean_latency": statistics.fmean(latencies),
        "mean_ttft": statistics.fmean(ttfts),
        "p99_ttft": statistics.quantiles(ttfts, n=100)[-1],
        "max_ttft": max(ttfts),
        "throughput": sum(record.output_len for record in done.records) / done.seconds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--loads", default="1.05,1.2,1.4", help="rates, as shares of what the engine did with a burst")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = make_adapters(DEMO / "base", RandomAdapters(args.adapters, ranks=(8, 16)), Path(folder))
        loaded = load(DEMO, max_num_seqs=16, num_blocks=400, device="cpu")
        for name, path in made:
            loaded.adapters.install(name, loaded.adapters.read(path), False, 0.0)
    names = [name for name, _ in made]
    at_once = [Arrival(0.0, arrival.request) for arrival in draw(names, 100.0, 1.5, 1e9, 1)]
    done = serve(loaded, at_once, "fcfs", cut=True)
    capacity = len(done.records) / done.seconds
    light = figures(serve(loaded, draw(names, capacity / 4, 10.0, 1e9, 2), "fcfs", cut=True))
    slo = 3.0 * light["mean_latency"]
    rows: list[dict[str, Any]] = []
    for share in map(float, args.loads.split(",")):
        trace = draw(names, capacity * share, args.seconds, slo, 3)
        for policy in ("fcfs", "inlaid"):
            rows.append({"load": share, "policy": policy, **figures(serve(loaded, trace, policy, cut=True))})
            print(json.dumps(rows[-1]), flush=True)
    setting = {"adapters": args.adapters, "slots": 32, "capacity": capacity, "slo": slo}
    record = {**provenance(seed=3), **setting, "rows": rows}
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
