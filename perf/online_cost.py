"""Cost of the demo's last task by every way to add it: processor seconds by part, and the peak of memory.

The full job quantizes for all tasks; the others start from all but one: offline as it is (bits of the full job), and
with the shortcuts that `inlaid.quant.settings.Shortcuts` describes. Each job runs in a process of its own with one
thread. Parts are processor seconds, as other work on the machine would count in wall time.

    python -m perf.online_cost --out FILE                                     last line of output: JSON
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch

from inlaid.checkpoint import Checkpoint
from inlaid.progress import Bar
from inlaid.quant import stopwatch
from inlaid.quant.bank import bank_path
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.quantize import Into, add_task, quantize
from inlaid.quant.record import Record
from inlaid.quant.settings import Gate, Settings, Shortcuts
from inlaid.report.provenance import provenance
from perf.quant_cost import DEMO, demo_tasks

ANYWAY = Gate(force=True)
WAYS = MappingProxyType(
    {
        "exact": Shortcuts(),
        "exact, shared checks": Shortcuts(check="shared"),
        "warm, shared checks": Shortcuts("warm", "shared"),
        "warm, shared checks, threshold 0": Shortcuts("warm", "shared", 0.0),
    }
)


def job(way: str, folder: Path, tokens: int, tasks: int) -> dict[str, Any]:
    """Run one job in this process; returns its seconds by part, losses and memory."""
    vars(stopwatch)["time"] = SimpleNamespace(perf_counter=time.process_time)  # its seconds are the processor's
    begun, sources = time.process_time(), demo_tasks()[:tasks]
    if way in ("full", "before"):
        out = folder / way
        settings = Settings(calibration=CalibrationSettings(tokens))
        record = quantize(DEMO / "base", sources if way == "full" else sources[:-1], settings, out, None, ANYWAY)
    else:
        start, out = folder / "before", folder / way.replace(", ", "-").replace(" ", "-")
        bank = folder / f"{out.name}.bank"
        shutil.copytree(bank_path(start), bank)
        record = add_task(start, sources[-1], None, ANYWAY, Into(out, bank), WAYS[way])
    moved = [site["moved"] for site in record.sites if "moved" in site]
    return {
        "seconds": time.process_time() - begun,
        "parts": record.seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": {name: task["loss_quantized"] for name, task in record.tasks.items()},
        "full_losses": {name: task["loss_full"] for name, task in record.tasks.items()},
        "sites_kept": sum(share < WAYS[way].threshold for share in moved) if moved else 0,
        "sites": len(record.sites),
        "largest_move": max(moved, default=None),
        "version": Checkpoint(out).fingerprint(),
    }


def in_process(way: str, folder: Path, tokens: int, tasks: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "perf.online_cost", "--way", way, "--folder", str(folder), "--tokens", str(tokens)]
    command += ["--tasks", str(tasks)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    folder: Path, tokens: int, tasks: int, ways: Sequence[str], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run these ways, one after the other, from a base that is made unless it is there; `keep` gets what there is."""
    jobs: dict[str, Any] = {}
    if not (folder / "before" / "inlaid.json").exists():
        in_process("before", folder, tokens, tasks)
    for way in Bar(ways, desc="adding a task", file=sys.stderr):
        jobs[way] = in_process(way, folder, tokens, tasks)
        keep(found := _compared(folder, jobs, tokens, tasks))
    return found


def _compared(folder: Path, jobs: dict[str, Any], tokens: int, tasks: int) -> dict[str, Any]:
    """Return the figures with the most that an old task has lost by each way, and whether the bits are the same."""
    before = Record.read(folder / "before").tasks
    return {
        "jobs": jobs,
        "worst_old_task": {
            way: max(found["losses"][name] - task["loss_quantized"] for name, task in before.items())
            for way, found in jobs.items()
        },
        "same_bits": jobs["exact"]["version"] == jobs["full"]["version"] if {"exact", "full"} <= jobs.keys() else None,
        "provenance": provenance(seed=Settings().calibration.seed)
        | {
            "torch": torch.__version__,
            "threads": 1,
            "tokens_per_task": tokens,
            "tasks": tasks,
            "load_average": os.getloadavg(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--way", help="used by the run itself, with the next")
    parser.add_argument("--folder", type=Path, help="where the bases lie; default: a temporary folder")
    parser.add_argument(
        "--tokens", type=int, default=CalibrationSettings().max_tokens, help="calibration tokens of each task"
    )
    parser.add_argument("--ways", nargs="+", default=[*WAYS, "full"], choices=[*WAYS, "full"], help="what is measured")
    parser.add_argument("--tasks", type=int, default=len(demo_tasks()), help="tasks in all")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(job(args.way, args.folder, args.tokens, args.tasks)))
        return
    if args.out is None:
        parser.error("--out says where the figures go")
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def keep(found: dict[str, Any]) -> None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(measure(args.folder or Path(name), args.tokens, args.tasks, args.ways, keep)))


if __name__ == "__main__":
    main()
