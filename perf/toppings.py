"""Toppings' experiment by one command: each way of having an adapter ready, under the artifact's small client.

    python -m perf.toppings --out perf/results/toppings-cpu.json

A server is started for each mode. The client sends three requests to warm up and then 60, one after another, "What is
AI?" with 32 new tokens, to each adapter in turn, so that with fewer places than adapters every request is for one that
is not on the device. The table has the artifact's figures (mean and total seconds of a request) and the parts of a
request's seconds by the server's log (`perf.parse_log`). Without a GPU `--link-gbps` stands in for a bus.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from inlaid.files import write_atomically
from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.report.provenance import provenance
from inlaid.report.tables import markdown
from perf.launch import Adapter, ServerCommand, find_adapters
from perf.parse_log import PARTS, averages
from perf.process import ROOT, Supervised, child_environment, free_port, wait_ready

MODES = ("cached", "pipelined", "on-demand")
PROMPT, NEW_TOKENS, WARM_UP, REQUESTS = "What is AI?", 32, 3, 60
DEMO = ROOT / "models" / "demo"


def ask(url: str, adapter: str) -> float:
    """Send the artifact's request for an adapter; return its seconds."""
    body = {"model": adapter, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0}
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    begin = time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", data, headers), timeout=300) as answer:
        tokens = json.load(answer)["usage"]["completion_tokens"]
    assert tokens == NEW_TOKENS, f"{tokens} tokens instead of {NEW_TOKENS}"
    return time.perf_counter() - begin


def measure(mode: str, args: argparse.Namespace, adapters: Sequence[Adapter], folder: Path) -> dict[str, Any]:
    """Start a server in one mode, send the requests, and return a row."""
    places = len(adapters) if mode == "cached" else args.max_loras
    flags: dict[str, str | int | float | bool] = {"adapter-mode": mode, "max-loras": places}
    if args.link_gbps:
        flags["adapter-link-gbps"] = args.link_gbps
    command = ServerCommand("inlaid", args.model, list(adapters), arguments=flags)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = Supervised(command.argv(port), folder, mode, child_environment({}))
    try:
        if problem := wait_ready(server, f"{url}/ready", args.ready_timeout):
            raise ValueError(f"{mode}: {problem}")
        names = [name for name, _ in adapters]
        wanted = [names[number % len(names)] for number in range(WARM_UP + args.requests)]
        took = [ask(url, name) for name in Bar(wanted, desc=mode, unit="req", leave=False)][WARM_UP:]
    finally:
        server.stop()
    parts = averages(server.error_log, WARM_UP)
    return {
        "mode": mode,
        "places": places,
        "requests": len(took),
        "mean_ms": 1e3 * fmean(took),
        "total_s": sum(took),
        **{f"{part}_ms": parts[part] for part in PARTS if part in parts},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows, a column for each figure that they have."""
    shown = [f"{part}_ms" for part in PARTS if any(f"{part}_ms" in row for row in rows)]
    keys = ["mean_ms", "total_s", *shown]
    head = ("mode", "places", "requests", *(key.replace("_", " ") for key in keys))
    cells = [[f"{row[key]:.2f}" if key in row else "-" for key in keys] for row in rows]
    return markdown(head, [(row["mode"], row["places"], row["requests"], *line) for row, line in zip(rows, cells)], "l")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the modes in turn, print the table, and write it with its provenance."""
    parser = Parser(prog="perf.toppings", description=__doc__)
    parser.add_argument("--model", default=str(DEMO / "base"), help="folder of the base")
    parser.add_argument(
        "--adapters", nargs="+", default=[str(DEMO / "adapters" / "*")], help="folders, or quoted globs"
    )
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated, in turn")
    parser.add_argument("--max-loras", type=int, default=3, help="places on the device, in all modes but cached")
    parser.add_argument("--link-gbps", type=float, default=0.0, help="GB/s of a bus that is not there; 0: memory's own")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--ready-timeout", type=float, default=600.0)
    parser.add_argument("--out", type=Path, help="file of the rows")
    args = parser.parse_args(arguments)
    try:
        adapters = find_adapters(args.adapters)
        if len(adapters) <= args.max_loras:
            raise ValueError(f"{len(adapters)} adapters fit into {args.max_loras} places: none would ever be loaded")
        with tempfile.TemporaryDirectory(prefix="inlaid-toppings-") as folder:
            rows = [measure(mode, args, adapters, Path(folder)) for mode in args.modes.split(",")]
    except (ValueError, OSError) as error:
        print(f"perf.toppings: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if args.out is not None:
        record = {**provenance(), "link_gbps": args.link_gbps, "rows": rows}
        write_atomically(args.out, (json.dumps(record, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
