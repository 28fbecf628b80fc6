"""One command for everything that is measured on a GPU: `python -m perf.gpu.bench --out FOLDER`.

Stages run one after another, each in a process of its own with a limit on its time, and each writes FOLDER/NAME.json
with what it found and where (commit, device, driver, versions, command). A stage that fails or runs out of time is
reported and the rest goes on. `--stages` picks some.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMITS = {  # seconds
    "sweep": 110, "gates": 240, "tests": 200, "micro": 300, "offline-7b": 280, "offline-7b-few": 150, "serve-7b": 200,
    "offline-8b": 280,
    "serve-8b": 200, "demo": 90, "soak": 150,
    "micro-adapters-ordered": 150, "micro-decode_attention-adapters": 120, "offline-tiny": 100, "serve-tiny": 100,
    "quant": 470,
}  # fmt: skip
DEFAULT = ("tests", "demo", "soak", "offline-7b", "serve-7b", "offline-8b", "serve-8b", "gates", "micro")


def provenance() -> dict[str, Any]:
    """Where and with what a figure was made."""
    import torch
    import triton

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip() if commit.returncode == 0 else os.environ.get("INLAID_COMMIT", "unknown"),
        "gpu": driver.stdout.strip(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "command": " ".join(sys.argv),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def run_stage(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The stage's own result, in this process."""
    if name == "gates":
        from perf.gpu import gates

        return gates.run()
    if name == "tests":
        return kernel_tests()
    if name.startswith("micro"):
        from perf.gpu import micro

        return micro.run(tuple(name.split("-")[1:]) or tuple(micro.PARTS))
    if name.startswith("offline-"):
        from perf.gpu import offline

        _, shape, *few = name.split("-")
        return offline.run(shape, few=bool(few))
    if name == "demo":
        from perf.gpu import demo

        return demo.run()
    if name == "soak":
        from perf.gpu import soak

        return soak.run()
    if name == "sweep":
        from perf.gpu import humming_sweep

        return humming_sweep.run()
    if name == "quant":
        from perf.gpu import quant_speed

        return quant_speed.measure(quant_speed.options().parse_args([]))
    if name.startswith("serve-"):
        from perf.gpu import offline, serving

        shape = name.removeprefix("serve-")
        return serving.run(shape, offline.ROWS[shape], offline.RANKS[shape])
    raise ValueError(f"unknown stage {name!r}; known: {', '.join(LIMITS)}")


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--stages", nargs="+", default=list(DEFAULT), choices=list(LIMITS))
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.in_process:
        (stage,) = args.stages
        found = provenance() | {"stage": stage, "result": run_stage(stage, args)}
        (args.out / f"{stage}.json").write_text(json.dumps(found, indent=1))
        return 0
    summary = [one_stage(stage, args) for stage in args.stages]
    print("\n".join(summary))
    return int(any("failed" in line for line in summary))


def one_stage(stage: str, args: argparse.Namespace) -> str:
    """Run it in a process of its own; one line of what became of it."""
    command = [sys.executable, "-m", "perf.gpu.bench", "--out", str(args.out), "--stages", stage, "--in-process"]
    begin = time.monotonic()
    try:
        code = subprocess.run(command, timeout=LIMITS[stage]).returncode
        ending = "done" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        ending = f"failed: ran past {LIMITS[stage]} s"
    return f"{stage}: {ending} after {time.monotonic() - begin:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
