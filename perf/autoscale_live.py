"""`python -m perf.autoscale_live TEMPLATE.toml --out DIR`: a template's scaling for real, with the demo on CPUs.

Starts `inlaid cluster` with the template's [router], port and extra-envs for its first model and feature, sends it the
first dataset's trace with lengths that the demo can take, samples the replicas twice a second, and draws the panels of
`perf.autoscale`. GPU-seconds are replica-seconds. Keys without a meaning here are told.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import msgspec

from inlaid.cluster.planner import router_of
from inlaid.flags import Parser
from inlaid.report.provenance import provenance
from inlaid.sim.request_log import Arrival, RequestRecord
from inlaid.sim.scaling import parse_feature
from inlaid.workload.toml import load_toml
from perf.autoscale import (
    BOUNDS,
    FLAGS_OF_SPLIT,
    SLO,
    TOGETHER,
    Point,
    arrivals,
    draw,
    reasons,
    summarize,
    without_meaning,
)
from perf.process import child_environment

LONGEST = 400  # tokens of a prompt; the demo takes 1,024 in all
SAMPLE = 0.5  # seconds between two looks at the replicas
FLAGS = ("--max-model-len", "1024", "--metrics-interval", "0", "--served-model-name", "demo")
BLOCKS = 1000  # of KV, at most, for each replica
_NO_GPU = "the demo runs on CPUs"
_REAL = "loads and transfers are real here"
WITHOUT_MEANING: Mapping[str, str] = MappingProxyType(
    {
        "global.num_gpus_per_node": _NO_GPU,
        "global.cuda_devices": _NO_GPU,
        "server.ibv_rate": "weights come from memory or disk of the one machine",
        "server.inter_node": "all replicas are on one machine",
        "server.config": "all replicas are on one machine",
        "router.mock_load_millis": _REAL,
        "router.mock_transfer_millis": _REAL,
        "model.model_path": "the demo stands for the model",
        "model.tokenizer": "the demo stands for the model",
        "model.num_hidden_layers": "the demo stands for the model",
    }
)


def command_of(
    data: Mapping[str, Any], template: Path, planner: str, port: int | None
) -> tuple[list[str], dict[str, str]]:
    """Return the cluster's command for the first model and feature that a template selects, and the keys and flags
    without a meaning here, with the reason."""
    selection = data["selection"]
    name, feature = selection["models"][0], next(iter(selection.get("features", [])), "")
    router = router_of(data.get("router", {}), data["models"][name])
    start, flags = parse_feature(data["features"][feature] if feature else "")
    flags |= {flag: TOGETHER for flag in FLAGS_OF_SPLIT if getattr(start, flag)}
    if start.live:
        flags["impl_live"] = "a replica serves when all of its weights are there"
    if start.mock:
        flags["mock_load"] = _REAL
    if start.source in ("cache", "host"):
        flags[start.source] = "new replicas read their files, which the machine's page cache may hold"
    told = {f"features.{feature}.{flag}": reason for flag, reason in flags.items()}
    told |= without_meaning(data, name, {**reasons(planner), **WITHOUT_MEANING})
    for honoured in ("router.port", "extra-envs"):
        told.pop(honoured, None)
    port = data.get("router", {}).get("port", 0) if port is None else port
    blocks = min(BLOCKS, router.num_available_blocks)
    argv = ["--router", str(template)] if planner == BOUNDS else ["--replicas", f"{router.least}:{router.most}"]
    argv += [*FLAGS, "--num-blocks", str(blocks), "--port", str(port)]
    argv += ["--weights-from", "peer" if start.source == "peer" else "disk"]
    return [sys.executable, "-m", "inlaid", "cluster", *argv], told


async def one(session: aiohttp.ClientSession, url: str, arrival: Arrival, began: float) -> RequestRecord:
    """Send a request when it is due and return its record; times are seconds from the start."""
    request = arrival.request
    await asyncio.sleep(max(0.0, began + arrival.time - time.monotonic()))
    sent = time.monotonic() - began
    number, first, last = int(request.id), None, None
    body = {
        "model": "demo",
        "prompt": [3 + (number + at) % 200 for at in range(len(request.prompt))],
        "max_tokens": request.params.max_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
    }
    with suppress(aiohttp.ClientError):
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            async for line in answer.content:
                if answer.status == 200 and line.startswith(b"data: {"):
                    first = first or time.monotonic() - began
                    last = time.monotonic() - began
    return RequestRecord(
        id=request.id,
        tenant="all",
        adapter=None,
        arrival=sent,
        prompt_len=len(request.prompt),
        output_len=request.params.max_tokens,
        first_token=first,
        finish=last,
    )


async def sample(session: aiohttp.ClientSession, url: str, began: float, points: list[Point]) -> None:
    """Note the replicas again and again."""
    while True:
        async with session.get(f"{url}/v1/replicas") as answer:
            states = [each["state"] for each in (await answer.json())["replicas"]]
        wanted = len(states) - states.count("draining")
        points.append((round(time.monotonic() - began, 2), wanted, len(states), states.count("serving")))
        await asyncio.sleep(SAMPLE)


async def replay(url: str, trace: list[Arrival]) -> tuple[list[RequestRecord], list[Point]]:
    """Send a trace and wait for all answers."""
    points: list[Point] = []
    timeout = aiohttp.ClientTimeout(total=900)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        began = time.monotonic()
        sampling = asyncio.create_task(sample(session, url, began, points))
        records = await asyncio.gather(*(one(session, url, arrival, began) for arrival in trace))
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
    return list(records), points


def serve(command: list[str], log: Path, environment: Mapping[str, Any]) -> tuple[subprocess.Popen[bytes], str]:
    """Start the cluster and return it with its address."""
    merged = child_environment({key: str(value) for key, value in environment.items()})
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=merged)
    while server.poll() is None:
        if found := re.search(r"at:\s+(http://\S+)/v1 ", log.read_text(errors="replace")):
            return server, found[1]
        time.sleep(0.2)
    raise ValueError(f"the cluster did not start; {log} says why")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="perf.autoscale_live", description="Run a template's scaling with the demo on CPUs.")
    parser.add_argument("template", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON, figure and the server's log")
    parser.add_argument(
        "--planner", choices=(BOUNDS, SLO), default=BOUNDS, help="the template's bounds, or an objective"
    )
    parser.add_argument(
        "--trace", default="", help="in the place of the dataset's file: one that the machine can serve"
    )
    parser.add_argument("--port", type=int, help="of the endpoint, 0: any free one; default: the template's")
    arguments: argparse.Namespace = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        data: dict[str, Any] = load_toml(arguments.template)
        name = data["selection"]["datasets"][0]
        dataset = data["datasets"][name]
        trace = arrivals(dataset | ({"dataset_path": arguments.trace} if arguments.trace else {}), 2 * LONGEST)
        command, told = command_of(data, arguments.template, arguments.planner, arguments.port)
        server, url = serve(command, arguments.out / "server.log", data.get("extra-envs", {}))
    except (ValueError, OSError, KeyError) as error:
        print(f"perf.autoscale_live: {arguments.template}: {error}", file=sys.stderr)
        return 2
    try:
        records, points = asyncio.run(replay(url, trace))
    finally:
        server.terminate()
        server.wait()
    used = sum(now[2] * (now[0] - before[0]) for before, now in zip([points[0], *points], points))
    row = summarize(records, points, used)
    planner = arguments.planner
    draw(arguments.out / f"autoscale-live-{planner}", f"{name}: {planner} planner, the demo on CPUs", {planner: row})
    path = arguments.out / f"autoscale-live-{planner}.json"
    found = {"planner": planner, "points": {name: row}, "without_meaning_here": told}
    made = msgspec.json.encode({**provenance(0), **found})
    path.write_bytes(msgspec.json.format(made, indent=1) + b"\n")
    print(json.dumps({key: value for key, value in row.items() if key not in ("over_time", "replicas")}))
    for key, reason in told.items():
        print(f"without a meaning here: {key}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
