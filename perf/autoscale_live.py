"""`python -m perf.autoscale_live TEMPLATE.toml --out DIR`: a template's scaling for real, with the demo on CPUs.

Starts `inlaid cluster --router TEMPLATE`, sends it the first dataset's trace with lengths that the demo can take,
samples the replicas twice a second, and draws the four panels of `perf.autoscale`. GPU-seconds are replica-seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from inlaid.flags import Parser
from inlaid.report.provenance import provenance
from inlaid.sim.request_log import Arrival, RequestRecord
from inlaid.workload.toml import load_toml
from perf.autoscale import Point, arrivals, draw, summarize
from perf.process import child_environment

LONGEST = 400  # tokens of a prompt; the demo takes 1,024 in all
SAMPLE = 0.5  # seconds between two looks at the replicas
FLAGS = ("--max-model-len", "1024", "--num-blocks", "200", "--metrics-interval", "0", "--served-model-name", "demo")


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


def serve(template: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start the cluster and return it with its address."""
    command = [sys.executable, "-m", "inlaid", "cluster", "--router", str(template), "--port", "0", *FLAGS]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=child_environment({}))
    while server.poll() is None:
        if found := re.search(r"at:\s+(http://\S+)/v1 ", log.read_text(errors="replace")):
            return server, found[1]
        time.sleep(0.2)
    raise ValueError(f"the cluster did not start; {log} says why")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="perf.autoscale_live", description="Run a template's scaling with the demo on CPUs.")
    parser.add_argument("template", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON, figure and the server's log")
    arguments: argparse.Namespace = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        data: dict[str, Any] = load_toml(arguments.template)
        name = data["selection"]["datasets"][0]
        trace = arrivals(data["datasets"][name], 2 * LONGEST)
        server, url = serve(arguments.template, arguments.out / "server.log")
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
    draw(arguments.out / f"autoscale-live-{name}", f"{name}: the demo on CPUs", {"bounds": row})
    path = arguments.out / "autoscale-live.json"
    made = msgspec.json.encode({**provenance(0), "points": {name: row}})
    path.write_bytes(msgspec.json.format(made, indent=1) + b"\n")
    print(json.dumps({key: value for key, value in row.items() if key not in ("over_time", "replicas")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
