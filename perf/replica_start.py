"""`python -m perf.replica_start --out FILE.json`: the seconds until a replica that is added on a CPU serves.

From files that no memory holds (the page cache is told to forget them), from files that it holds, and from a running
peer's memory (`--weights-from peer`), whose first time includes writing the weight image; the last two with a process
that waits, its libraries loaded (`--standby`), too. The model is a
random one of a known shape with adapters of mixed rank. The parts of a start are those that the engine's log names.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import msgspec

from inlaid.files import write_atomically
from inlaid.flags import Parser
from inlaid.report.provenance import provenance
from perf.gpu.cluster import KEY, add_replica
from perf.gpu.serving import free_port, stop, wait_ready
from perf.process import child_environment

RANKS = (8, 16, 32, 64)
FLAGS = ("--device", "cpu", "--num-blocks", "256", "--max-model-len", "1024", "--max-lora-rank", str(max(RANKS)))
COLD = "disk"
WAYS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        COLD: ("--weights-from", "disk"),
        "page cache": ("--weights-from", "disk"),
        "peer": ("--weights-from", "peer"),
        "page cache, standby": ("--weights-from", "disk", "--standby"),
        "peer, standby": ("--weights-from", "peer", "--standby"),
    }
)
PARTS = re.compile(
    r"^(\S+): INFO start-up: process ([\d.]+) s, imports ([\d.]+) s, model ([\d.]+) s, adapters ([\d.]+) s$", re.M
)


def forget(folder: Path) -> None:
    """Tell the page cache to forget the files below a folder."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drain(port: int, name: str) -> None:
    """Remove a replica."""
    headers = {"Authorization": f"Bearer {KEY}"}
    address = f"http://127.0.0.1:{port}/v1/replicas/{name}"
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers, method="DELETE"), timeout=60) as done:
        done.read()


def measure(
    model: Path, adapters: dict[str, str], flags: Sequence[str], cold: bool, repeats: int, log: Path
) -> list[float]:
    """Add a replica and remove it again and again; return the seconds that each took to serve."""
    port = free_port()
    argv = [sys.executable, "-m", "inlaid", "cluster", str(model), "--port", str(port), "--admin-key", KEY, *FLAGS]
    argv += ["--replicas", "1", *flags, "--max-loras", str(max(1, len(adapters) // 4))]
    argv += ["--adapter", *(f"{name}={path}" for name, path in adapters.items())] if adapters else []
    with log.open("wb") as output:
        server = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, env=child_environment({}))
    seconds = []
    try:
        wait_ready(server, port, 300)
        for number in range(1, repeats + 1):
            if cold:
                forget(model.parent)
            if "--standby" in flags:
                wait_for_standby(log, number)
            seconds.append(round(add_replica(port), 3))
            drain(port, f"replica-{number}")
            print(f"{' '.join(flags)}: {seconds[-1]} s", flush=True)
    finally:
        stop(server)
    return seconds


def wait_for_standby(log: Path, count: int, limit: float = 300.0) -> None:
    """Wait until as many processes have told that they wait."""
    end = time.monotonic() + limit
    while log.read_text(errors="replace").count("INFO standby: ") < count:
        if time.monotonic() > end:
            raise RuntimeError(f"no process waits for the next replica; {log} says more")
        time.sleep(0.1)


def parts(log: Path) -> list[dict[str, float]]:
    """Return the parts of the starts of added replicas, in order, from the server's log."""
    names = ("process", "imports", "model", "adapters")
    found = PARTS.findall(log.read_text(errors="replace"))
    return [dict(zip(names, map(float, each[1:]))) for each in found if each[0] != "replica-0"]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="perf.replica_start", description="Measure how long a new replica takes to serve, on a CPU.")
    parser.add_argument("--shape", default="135m", help="of the random model: 135m, tiny, 7b, 8b")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    arguments: argparse.Namespace = parser.parse_args(argv)
    from perf.gpu.random_model import write_adapters, write_model

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="inlaid-start-") as folder:
        spec = write_model(Path(folder) / "model", arguments.shape, group=64)
        adapters = write_adapters(Path(folder) / "adapters", spec, arguments.adapters, RANKS)
        for name, flags in WAYS.items():
            log = arguments.out.with_suffix(".log")
            seconds = measure(Path(folder) / "model", adapters, flags, name == COLD, arguments.repeats, log)
            row = {"from": name, "seconds": seconds, "median": median(seconds), "parts": parts(log)}
            rows.append(row)
            print(row, flush=True)
            log.unlink()
    made = {
        **provenance(0),
        "load_average": os.getloadavg(),
        "shape": arguments.shape,
        "adapters": arguments.adapters,
        "ranks": RANKS,
        "rows": rows,
    }
    write_atomically(arguments.out, msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
