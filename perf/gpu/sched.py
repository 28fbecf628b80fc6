"""Compare the simulator with the engine on this device. A random model with 32 adapters serves bursts, a cost model is
fitted to their steps, and both serve traffic that the fit has not seen. Throughput, mean time to the first token and
mean latency must agree within 5%. A stage of bench.py: about 170 seconds, a third of them the engine's start with cold
caches.

Beside the result lie MACHINE.json, the fitted machine in the form that `inlaid sim --machine` reads (that of an H200
is kept as inlaid/sim/machines/h200.json), the steps it was fitted to, for `python -m inlaid.sim.fit`, and the requests
that were compared, for `python -m perf.rounds`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from inlaid.report.provenance import provenance
from inlaid.sim.cost import load_cost
from inlaid.sim.fit import errors, fit, write_cost, write_steps
from inlaid.worker.build import build_engine
from perf.gpu import ROOT, Keep
from perf.gpu.offline import RANKS, engine_config
from perf.gpu.random_model import write_adapters, write_model
from perf.validate import Comparison, Plan, validate

PLAN = Plan(loads=(0.6,), seconds=8.0, rounds=2, prompt=(16, 512), output=(8, 128))
TOLERANCE = 0.05


def run(
    out: Path,
    shape: str = "8b",
    num_adapters: int = 32,
    plan: Plan = PLAN,
    device: str = "cuda",
    root: Path = ROOT / "sched",
    keep: Keep = lambda part: None,
) -> dict[str, Any]:
    """Build the engine, measure steps, fit the cost model, and compare."""
    begin = time.perf_counter()
    spec = write_model(root / "model", shape)
    adapters = write_adapters(root / "adapters", spec, num_adapters, RANKS["8b"])
    written = time.perf_counter()
    config = engine_config(root / "model", num_adapters, max(RANKS["8b"]))
    if device == "cpu":
        config = replace(config, device="cpu", dtype="float32", scheduler=replace(config.scheduler, max_num_seqs=16))
    loaded = build_engine(config, adapters)
    ready = time.perf_counter()

    def on_row(found: Comparison) -> None:
        write_steps(out / "sched-fitted.jsonl", found.fitted)
        write_steps(out / "sched-unseen.jsonl", found.unseen)
        (out / "sched-rounds.json").write_bytes(msgspec.json.encode(found.rounds))
        keep({"requests_per_second": found.rate, "rows": found.rows})

    found = validate(loaded, plan, on_row)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    machine = name.removeprefix("NVIDIA ").split()[0].lower()
    link = load_cost("h200")  # how long an adapter takes to arrive is not in the steps
    source = f"fitted to {len(found.fitted)} steps of the {shape} shape, 4 bits, {num_adapters} adapters on q, k, v, o"
    cost = fit(found.fitted, machine, source, link.load_base, link.load_rank)
    quality = errors(cost, found.unseen)
    write_cost(out / f"{machine}.json", cost, quality, {**provenance(), "device": name})
    off = [abs(row[key]) for row in found.rows for key in ("throughput_error", "ttft_error", "latency_error")]
    return {
        "shape": shape,
        "adapters": num_adapters,
        "overlap": loaded.engine.runner.overlap,
        "plan": asdict(plan),
        "write_s": written - begin,
        "start_s": ready - written,
        "measure_s": time.perf_counter() - ready,
        "requests_per_second": found.rate,
        "rows": found.rows,
        "fit_on_unseen_steps": quality,
        "within_5_percent": max(off) <= TOLERANCE,
    }
