"""Measure what a CPU gains by 4-bit weights that stay packed: steps of decodes, a prompt, and memory, beside the same
weights dequantized at load.

    python -m perf.cpu_packed [--shape 135m] [--group 64] [--gguf FILE] [--out perf/results/cpu-packed.json]

With a GGUF file of the same shape llama.cpp is measured too (`perf/cpu_llama.py`).
Each way has a process of its own, and one thread, whose processor time is the clock: it does not count what else the
machine does. The model is random, of a real shape.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from inlaid.files import write_atomically
from inlaid.report.provenance import provenance
from perf import cpu_llama

WAYS = ("reference", "packed")
LLAMA_CPP = "llama.cpp"
ROWS = (1, 4, 8, 32)
PROMPT, OUTPUT = 32, 24
LONG = 512  # tokens of the prompt that is timed
NO_LIMIT = 1_000_000  # of a step's time: all rows begin at once, and decode together


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135m", help="a shape of perf.gpu.random_model (default: 135m)")
    parser.add_argument("--group", type=int, default=64, help="inputs of one group (default: 64)")
    parser.add_argument("--gguf", type=Path, help="of the same shape, for llama.cpp (pip install cyllama)")
    parser.add_argument("--out", type=Path, help="a JSON file for what was found")
    parser.add_argument("--way", choices=(*WAYS, LLAMA_CPP), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way == LLAMA_CPP:
        print(json.dumps(cpu_llama.measure(given.model, ROWS, PROMPT, OUTPUT, LONG)))
        return 0
    if given.way:
        print(json.dumps(measure(given.model, given.way)))
        return 0
    report = compare(given.shape, given.group, given.gguf)
    print(json.dumps(report, indent=1))
    if given.out:
        write_atomically(given.out, (json.dumps(report, indent=1) + "\n").encode())
    return 0


def compare(shape: str, group: int, gguf: Path | None) -> dict[str, Any]:
    """Write the model, measure all ways, and return their figures and ratios."""
    from perf.gpu.random_model import write_model

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape, group=group)
        found = {way: _measured(way, Path(folder)) for way in WAYS}
    reference, packed = (found[way] for way in WAYS)
    ratios = {f"step of {rows}": reference[f"step of {rows}"] / packed[f"step of {rows}"] for rows in ROWS}
    ratios["prompt"] = reference["prompt"] / packed["prompt"]
    same = packed.pop("tokens") == reference.pop("tokens")
    ratios["memory"] = reference["mib"] / packed["mib"]
    if gguf is not None:
        found[LLAMA_CPP] = beside = _measured(LLAMA_CPP, gguf)
        ratios |= {f"{LLAMA_CPP}, {name}": beside[name] / packed[name] for name in beside}
    head = {"provenance": provenance(packages=("torch", "cyllama")), "load_average": os.getloadavg()[0]}
    what = {"shape": shape, "group": group, "unit": "ms of one thread"}
    return {**head, **what, **found, "over packed": ratios, "equal tokens": same}


def _measured(way: str, model: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "perf.cpu_packed", "--way", way, "--model", str(model)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(model: Path, way: str) -> dict[str, Any]:
    """Return the milliseconds of decode steps by rows and of a prompt, the memory of the weights, and greedy tokens."""
    import torch

    from inlaid.config import CacheConfig, EngineConfig, SchedulerConfig
    from inlaid.engine.request import NewRequest, SamplingParams
    from inlaid.worker.build import build_engine

    torch.set_num_threads(1)
    config = EngineConfig(
        model=str(model), device="cpu", linear_backend=way, max_model_len=1024,
        cache=CacheConfig(num_blocks=128, enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=LONG, max_step_ms=NO_LIMIT),
    )  # fmt: skip
    before = _resident_mib()
    loaded = build_engine(config, {})
    engine, found = loaded.engine, dict[str, Any]()
    found["mib"] = _resident_mib() - before
    vocab = loaded.model.vocab_size
    generator = torch.Generator().manual_seed(0)

    def run(rows: int, prompt: int, output: int) -> tuple[list[float], list[list[int]]]:
        """Return the milliseconds of the steps in which all rows made a token, and the tokens."""
        params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        for row in range(rows):
            ids = torch.randint(3, vocab, (prompt,), generator=generator).tolist()
            engine.add(NewRequest(id=f"{rows}-{prompt}-{row}", prompt=ids, params=params))
        steps: list[float] = []
        tokens: list[list[int]] = []
        while engine.has_work:
            begin = time.process_time()
            made = [output.tokens for output in engine.step()]
            if len(made) == rows:
                steps.append((time.process_time() - begin) * 1e3)
            tokens += made
        return steps, tokens

    run(2, 8, 4)
    found["prompt"] = min(run(1, LONG, 1)[0][0] for _ in range(3))
    found["tokens"] = []
    for rows in ROWS:
        steps, tokens = run(rows, PROMPT, OUTPUT)
        found[f"step of {rows}"] = median(steps[-OUTPUT // 2 :])
        found["tokens"].append(tokens)
    return found


def _resident_mib() -> float:
    """Return the process's own memory; pages of mapped files come and go as the machine likes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


if __name__ == "__main__":
    sys.exit(main())
