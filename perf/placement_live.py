"""Placement checked against live replicas: `python -m perf.placement_live --out perf/results/placement-live.json`.

For each placement `inlaid cluster` serves the demo with two replicas on this machine's cores, and gets a minute of a
trace of functions, thinned to a rate, whose adapters are the demo's. What the replicas say of their own steps
(`GET /v1/steps`) is fitted, and the same requests go through the simulator's replicas with that machine and placement.
The figure is Toppings': a request's latency over its tokens, queueing included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import aiohttp

from inlaid.cluster.placement import make_placement
from inlaid.files import write_atomically
from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.report.provenance import provenance
from inlaid.report.tables import markdown
from inlaid.sim.cluster import simulate_cluster
from inlaid.sim.cost import CostModel, prices_of
from inlaid.sim.fit import ask_steps, errors, fit
from inlaid.sim.placement import Call, functions_trace
from inlaid.sim.request_log import as_arrivals
from inlaid.sim.simulate import Setup
from inlaid.workload.functions import synthetic
from inlaid.workload.plan import PlannedRequest
from perf.launch import find_adapters
from perf.process import ROOT, Supervised, child_environment, free_port, wait_ready

PLACEMENTS = ("random", "least-loaded", "rank-aware")
DEMO = ROOT / "models" / "demo"
REPLICAS, SEATS, PROMPT, TOKENS = 2, 8, 48, 24
FUNCTIONS = 4_000


async def send(url: str, calls: Sequence[Call], names: Sequence[str]) -> list[float]:
    """Send each call when it is due; return the seconds per token of each, in order."""
    begin = time.perf_counter()
    limit = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=limit, timeout=aiohttp.ClientTimeout(total=300)) as session:

        async def one(number: int, call: Call) -> float:
            await asyncio.sleep(max(0.0, begin + call.arrival - time.perf_counter()))
            prompt = [(7 * number + 13 * place) % 400 + 10 for place in range(PROMPT)]
            body = {"model": names[call.adapter % len(names)], "prompt": prompt, "max_tokens": call.tokens,
                    "ignore_eos": True, "temperature": 0}  # fmt: skip
            async with session.post("/v1/completions", json=body) as answer:
                found = await answer.json()
                assert answer.status == 200, found
            return (time.perf_counter() - begin - call.arrival) / call.tokens

        return list(await asyncio.gather(*(one(number, call) for number, call in enumerate(calls))))


def live(
    placement: str, calls: Sequence[Call], folder: Path, port: int
) -> tuple[list[float], CostModel, dict[str, float]]:
    """Serve the calls by replicas; return seconds per token, and the machine that is fitted to their steps with its
    errors."""
    adapters = find_adapters([str(DEMO / "adapters" / "*")])
    command = [
        sys.executable,
        "-m",
        "inlaid",
        "cluster",
        str(DEMO / "base"),
        "--port",
        str(port),
        "--replicas",
        str(REPLICAS),
    ]
    command += [
        "--placement",
        placement,
        "--max-num-seqs",
        str(SEATS),
        "--no-enable-prefix-caching",
        "--max-loras",
        "12",
    ]
    command += [part for name, path in adapters for part in ("--adapter", f"{name}={path}")]
    server, url = (
        Supervised(command, folder, placement, child_environment({"OMP_NUM_THREADS": "1"})),
        f"http://127.0.0.1:{port}",
    )
    try:
        if problem := wait_ready(server, f"{url}/ready", 300.0):
            raise ValueError(f"{placement}: {problem}")
        names = [name for name, _ in adapters]
        warm = [Call(0.02 * number, number, 8, 4) for number in range(2 * len(names))]
        asyncio.run(send(url, warm, names))
        times = asyncio.run(send(url, calls, names))
        steps = ask_steps(url, None).steps
    finally:
        server.stop()
    cost = fit(steps, "replicas", "fitted to the replicas' steps")
    return times, cost, errors(cost, steps)


def simulated(
    placement: str, calls: Sequence[Call], ranks: Mapping[str, int], cost: CostModel, seed: int
) -> list[float]:
    """Serve the same calls, for adapters of these ranks, by simulated replicas; return seconds per token."""
    names = list(ranks)
    planned = [
        PlannedRequest(index=number, at=call.arrival, adapter=names[call.adapter % len(names)], tenant="",
                       service_class="", prompt=[0] * PROMPT, prompt_len=PROMPT, output_len=call.tokens)
        for number, call in enumerate(calls)
    ]  # fmt: skip
    setup = Setup(cost=cost, num_tokens=10**6, ranks=dict(ranks), resident=tuple(names), lengths="none",
                  scheduler={"max_num_seqs": SEATS}, max_paired_tenants=0)  # fmt: skip
    chosen = make_placement(placement, prices_of(cost), seed)
    outcome = simulate_cluster(as_arrivals(planned, names, real=True), setup, chosen, REPLICAS, share_service=False)
    return [each.latency / each.output_len for each in outcome.records if each.latency is not None]


def compare(placement: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Serve the calls live and simulated under one placement; return a row."""
    calls = functions_trace(args.rate, args.seconds, args.seed, synthetic(FUNCTIONS, args.seed), TOKENS)
    ranks = {
        name: int(json.loads((Path(path) / "adapter_config.json").read_text())["r"])
        for name, path in find_adapters([str(DEMO / "adapters" / "*")])
    }
    there, cost, quality = live(placement, calls, folder, free_port())
    here = simulated(placement, calls, ranks, cost, args.seed)
    return {
        "placement": placement,
        "requests": len(there),
        "live_mean_ms": 1e3 * fmean(there),
        "simulated_mean_ms": 1e3 * fmean(here),
        "error": fmean(here) / fmean(there) - 1.0,
        "steps": quality["steps"],
        "r_squared": quality["r_squared"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the placements in turn, print the table and write it."""
    parser = Parser(prog="perf.placement_live", description=__doc__)
    parser.add_argument("--placements", default=",".join(PLACEMENTS))
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="inlaid-placement-") as folder:
            rows = [
                compare(name, args, Path(folder))
                for name in Bar(args.placements.split(","), desc="placement", leave=False)
            ]
    except (ValueError, OSError, aiohttp.ClientError) as error:
        print(f"perf.placement_live: {error}", file=sys.stderr)
        return 2
    head = ("placement", "requests", "live ms/token", "simulated", "off")
    print(markdown(head, [
        [row["placement"], row["requests"], f"{row['live_mean_ms']:.1f}", f"{row['simulated_mean_ms']:.1f}",
         f"{row['error']:+.1%}"] for row in rows
    ], "l"))  # fmt: skip
    if args.out is not None:
        record = {**provenance(args.seed), "rate": args.rate, "seconds": args.seconds, "rows": rows}
        write_atomically(args.out, (json.dumps(record, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
