"""What does one more task cost, and how much memory does quantizing hold?

Adding a task must not cost what quantizing for all of them did: the demo's twelve tasks are quantized together, then
eleven and one more, and the seconds spent on Hessians are compared. Memory must not grow with the depth of the model:
the same random blocks, few and many, are quantized in processes of their own, and the peak of anonymous memory
(weights, Hessians, hidden states; not the mapped files) is compared with what one block and its Hessians come to.

    python -m perf.quant_cost --out perf/results/cpu-quant-cost.json        last line of output: JSON
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from inlaid.quant import quantize as rail
from inlaid.quant.grid import Grid
from inlaid.quant.quantize import add_task, quantize
from inlaid.quant.settings import Gate, Place, Settings, TaskSource

DEMO = Path("models/demo")
BLOCK = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 8}


# Freed memory goes back to the system at once, so that the peak is of what is in use and not of what malloc kept.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class HessianClock:
    """Counts the seconds spent in forward passes with Hessians."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.work = rail.block_hessians

    def __call__(self, *args: Any, **more: Any) -> Any:
        start = time.perf_counter()
        result = self.work(*args, **more)
        self.seconds += time.perf_counter() - start
        return result

    def of(self, job: Callable[[], Any]) -> tuple[float, float]:
        """Hessian seconds and all seconds of a job."""
        self.seconds, start = 0.0, time.perf_counter()
        rail.block_hessians = self
        job()
        rail.block_hessians = self.work
        return self.seconds, time.perf_counter() - start


def one_more_task(folder: Path) -> dict[str, float]:
    names = sorted(json.loads(Path("data/tasks.json").read_text()))
    sources = [TaskSource(name, DEMO / "adapters" / name, Path(f"data/{name}/calibration.jsonl")) for name in names]
    settings, clock = Settings(aggregation="mean"), HessianClock()
    twelve, whole = clock.of(lambda: quantize(DEMO / "base", sources, settings, folder / "twelve"))
    quantize(DEMO / "base", sources[:-1], settings, folder / "eleven")
    one, added = clock.of(lambda: add_task(folder / "eleven", sources[-1]))
    same = all(
        file.read_bytes() == (folder / "eleven" / file.name).read_bytes()
        for file in (folder / "twelve").glob("*.safetensors")
    )
    return {
        "hessian_seconds_twelve": twelve,
        "hessian_seconds_twelfth": one,
        "share": one / twelve,
        "all_seconds_twelve": whole,
        "all_seconds_adding": added,
        "same_bits": same,
    }


def anonymous_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this kernel does not report RssAnon; run on Linux")


def peak_of_depth(depth: int, folder: Path) -> float:
    """MiB above the start, at the peak, for a random base of so many blocks."""
    torch.set_num_threads(1)
    config = AutoConfig.for_model("llama", **BLOCK, num_hidden_layers=depth, vocab_size=1024)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder / "base")
    for file in (DEMO / "base").glob("tokenizer*"):
        (folder / "base" / file.name).write_bytes(file.read_bytes())
    source = TaskSource("maths", Path("none"), Path("data/maths/calibration.jsonl"))
    settings = Settings(Grid(4, 128), aggregation="mean", dtype="float32")
    ended, peak, before = threading.Event(), 0.0, anonymous_mib()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.01):
            peak = max(peak, anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    quantize(folder / "base", [source], settings, folder / "out", Place(), Gate(force=True))
    ended.set()
    watcher.join()
    return peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depth", type=int, help="only measure the memory of one depth (used by the whole run)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if args.depth:
            print(peak_of_depth(args.depth, Path(name)))
            return
        cost = one_more_task(Path(name))
    peaks = {}
    for depth in (4, 16):
        command = [sys.executable, "-m", "perf.quant_cost", "--out", str(args.out), "--depth", str(depth)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | GIVE_BACK)
        peaks[depth] = float(done.stdout.splitlines()[-1])
    hidden, mlp = BLOCK["hidden_size"], BLOCK["intermediate_size"]
    block = 4 * (4 * hidden**2 + 3 * hidden * mlp) / 2**20
    hessians = 4 * (3 * hidden**2 + mlp**2) / 2**20
    result = {
        "adding_the_twelfth_task": cost,
        "peak_mib_by_depth": peaks,
        "one_block_mib": block,
        "its_hessians_mib": hessians,
        "weights_mib_by_depth": {depth: block * depth for depth in peaks},
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "command": f"python -m perf.quant_cost {' '.join(sys.argv[1:])}",
        "malloc": GIVE_BACK,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
