"""One command for everything that is measured on a GPU: `python -m perf.gpu.bench --out FOLDER --call first`.

Stages run one after another, each in a process of its own with a limit on its time, and each writes FOLDER/NAME.json
with what it found and where (commit, device, driver, versions, command), first as far as it has come and then whole. A
stage that fails or runs out of time is reported and the rest goes on. `--call first` (second, third) are ten minutes'
worth of them, what decides most first; `--stages` picks some.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMITS = {  # seconds; in the order of what they decide
    "tests": 110, "sweep": 140, "variants-7b": 130, "variants-8b": 130, "serve-7b": 150, "serve-8b": 130,
    "determinism-7b": 120, "startup-7b": 150, "ranks-7b": 200, "exllama-7b": 120, "exllama-demo": 90, "soak": 110,
    "demo": 90, "gates": 240, "micro": 300, "offline-7b": 150, "offline-8b": 130, "startup-8b": 150,
    "micro-decode_attention-pending": 90, "micro-ordered": 120,
    "sched": 160, "quant": 470,
    "adapters-load": 60, "adapters-modes-cached": 150, "adapters-modes-on-demand": 150,
    "adapters-modes-pipelined": 150, "adapters-modes-cpu-assist": 150,
    "adapters-cliff-mixed": 120, "adapters-cliff-slots": 150, "adapters-cliff-resident": 120, "adapters-crossover": 150,
    "serve-tiny": 100, "ranks-tiny": 100, "variants-tiny": 100, "determinism-tiny": 60, "startup-tiny": 150,
}  # fmt: skip
FIRST = ("tests", "sweep", "variants-7b", "variants-8b", "serve-7b", "serve-8b")
SECOND = ("serve-7b", "serve-8b", "determinism-7b", "startup-7b", "ranks-7b")
THIRD = ("exllama-7b", "exllama-demo", "soak", "demo", "gates", "micro-decode_attention-pending")
CALLS = {"first": FIRST, "second": SECOND, "third": THIRD}  # each within ten minutes


def provenance() -> dict[str, Any]:
    """Where and with what a figure was made."""
    import torch
    import triton

    driver = said("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader")
    return {
        "commit": said("git", "rev-parse", "HEAD") or os.environ.get("INLAID_COMMIT", "unknown"),
        "gpu": driver or "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "command": " ".join(sys.argv),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def said(*command: str) -> str:
    """What a program prints; nothing where it is not there or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def run_stage(name: str, out: Path, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The stage's own result, in this process; `keep` writes what there is so far."""
    from perf.gpu import adapters, demo, gates, humming_sweep, micro, offline, quant_speed, sched, serving, soak

    kind, _, rest = name.partition("-")
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": kernel_tests,
        "sweep": lambda: humming_sweep.run(keep),
        "gates": lambda: gates.run(keep),
        "micro": lambda: micro.run(keep, tuple(rest.split("-")) if rest else tuple(micro.PARTS)),
        "demo": demo.run,
        "soak": soak.run,
        "sched": lambda: sched.run(out),
        "quant": lambda: quant_speed.measure(quant_speed.options().parse_args([])),
        "adapters": lambda: adapters.run(name, keep),
        "offline": lambda: offline.run(rest, keep),
        "determinism": lambda: offline.determinism(rest, keep),
        "variants": lambda: offline.variants(rest, keep),
        "serve": lambda: serving.run(rest, offline.ROWS[rest], offline.RANKS[rest], keep),
        "ranks": lambda: serving.ranks(rest, keep),
        "startup": lambda: serving.start_up(rest, keep),
        "exllama": lambda: demo.run("exllama") if rest == "demo" else serving.on_backend(rest, "exllama", keep),
    }
    return stages[kind]()


def kernel_tests() -> dict[str, Any]:
    """The kernels' unit tests, on this GPU instead of in the interpreter."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "8",
        "-p",
        "no:cacheprovider",
        "tests/kernels",
        "tests/engine/test_cuda_runner.py",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    tail = result.stdout.strip().splitlines()[-60:]
    return {"failed": result.returncode != 0, "tail": tail}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--call", choices=list(CALLS), help="the stages of a ten-minute call")
    parser.add_argument("--stages", nargs="+", default=[], choices=list(LIMITS))
    parser.add_argument("--seconds", type=float, default=1e9, help="for all of it; what no longer fits is cut short")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stages = [*CALLS.get(args.call, ()), *args.stages]
    if args.in_process:
        (stage,) = stages
        file = args.out / f"{stage}.json"
        about = provenance() | {"stage": stage}

        def keep(part: dict[str, Any]) -> None:
            write(file, about | {"cut_short": True, "result": part})

        result = run_stage(stage, args.out, keep)
        write(file, about | {"result": result})
        return int(bool(result.get("error") or result.get("failed")))
    end = time.monotonic() + args.seconds
    lines = [one_stage(stage, args.out, end) for stage in stages]
    print("\n".join(["", *lines]))
    return int(any("failed" in line for line in lines))


def write(file: Path, found: dict[str, Any]) -> None:
    """In place of what was there, whole."""
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(found, indent=1) + "\n")
    scratch.replace(file)


def one_stage(stage: str, out: Path, end: float) -> str:
    """Run it in a process of its own, which takes what it started along when its time is over; a line about it."""
    limit = min(LIMITS[stage], end - time.monotonic())
    if limit < 5:
        return f"{stage}: failed: no time was left"
    command = [sys.executable, "-m", "perf.gpu.bench", "--out", str(out), "--stages", stage, "--in-process"]
    begin = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit)
        ending = "done" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ending = f"failed: ran past {limit:.0f} s"
    file = out / f"{stage}.json"
    said = headline(json.loads(file.read_text())["result"]) if file.exists() else ""
    line = f"{stage}: {ending} after {time.monotonic() - begin:.0f} s" + (f": {said}" if said else "")
    print(line, flush=True)
    return line


def headline(result: dict[str, Any]) -> str:
    """What matters most of a stage's result."""
    parts = [f"ready in {result['ready_s']:.1f} s"] if "ready_s" in result else []
    for row in result.get("rows", ()):
        alone = row["concurrency"] == 1
        speed = f"{row['ms_per_token']:.2f} ms" if alone else f"{row['output_tokens_per_second']:.0f} tok/s"
        parts.append(f"{row.get('names', '')}{row['adapters']}@{row['concurrency']} {speed}")
    for start in result.get("starts", ()):
        parts.append(f"{start['caches']} {start.get('ready_s', float('nan')):.1f} s")
    for step in result.get("steps", ()):
        timed = [choice for choice in step["choices"] if "us" in choice]
        if timed:
            best = min(timed, key=lambda choice: choice["us"])
            about = f"{step['adapters']}@{step['rows']} {timed[0]['us']:.0f} us"
            parts.append(f"{about}, {best['variant']} {best['us']:.0f} ({timed[0]['same_bits']} equal)")
    for name, found in result.items():
        if isinstance(found, dict) and "all_equal" in found:
            parts.append(f"{name}: {found['all_equal']} of {found['repetitions']} equal")
    for name in ("mixed_over_uniform", "share", "error", "failed", "different_alone", "left_over"):
        if result.get(name) not in (None, False, [], {}):
            parts.append(f"{name} {str(result[name])[:200]}")
    for entry in result.get("entries", ()):
        parts.append(f"{entry['inputs']}x{entry['outputs']}@{entry['rows']} {entry['own_us']}->{entry['best_us']}")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
