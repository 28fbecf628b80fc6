"""The fastest parameters for humming's kernels among those that add in a fixed order, shape by shape and for few, some
and many rows: candidates (inlaid/kernels/humming_order.py) are compiled side by side, checked against the package's
own choice and for equal bits, and timed. Writes humming_tuning.json into the package; entries there without `ordered`,
for `--no-deterministic`, are from this file at commit 4609c2b. One stage of bench.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from inlaid.checkpoint import QuantSpec
from inlaid.kernels import command, humming_order
from inlaid.kernels.humming import OPEN, TUNING, HummingLinear, HummingPacked, _import
from inlaid.kernels.humming_order import Problem
from inlaid.kernels.measure import CACHE, random_weight, time_calls, weight_bytes

BUCKETS = {64: (48, 64), 1: (1, 2, 4, 8), 16: (16,), 256: (192, 256), 32: (24, 32), 128: (96, 128), 512: (512,),
           2048: (1024, 2048, 4096)}  # rows timed -> buckets that the winner serves  # fmt: skip
BELOW = {1: 0, 16: 8, 32: 16, 64: 32, 128: 64, 256: 128, 512: 256, 2048: 512}
TRIED = 7  # candidates of each
REPEATS = 5
DEVICE = torch.device("cuda")
SPEC = QuantSpec(4, 128, True, False)
UNSET = {"num_sms": 0, "multi_cast_size_a": 1}  # what a change must say, lest the bucket's own choice stays


def problem_of(inputs: int, outputs: int, rows: int, sms: int) -> Problem:
    """All rows that the winner will serve."""
    most = OPEN if rows == max(BUCKETS) else BUCKETS[rows][-1]
    return Problem(inputs, outputs, SPEC.group_size, BELOW[rows], most, sms)


def compile_one(kind: str, config: dict[str, Any]) -> torch.Tensor | None:
    """None where its checks refuse the configuration, or where its blocks could not all be on the device at once: they
    wait for each other."""
    try:
        kernels = _import().prepare(kind, None, [[0, 1 << 30, config]], DEVICE)
        shared = torch.ops.humming.get_kernel_smem_size(int(kernels[2]))
    except Exception:  # noqa: BLE001 - a configuration that its checks refuse is no candidate
        return None
    return kernels if (shared + 1024) * config.get("num_ctas_per_sm", 1) <= 227 * 1024 else None


def sweep_shape(inputs: int, outputs: int, compilers: ThreadPoolExecutor) -> list[dict[str, Any]]:
    backend = HummingLinear()
    copies = max(2, int(CACHE // weight_bytes(inputs, outputs, SPEC)) + 1)
    packed = [
        backend.prepare(random_weight(inputs, outputs, SPEC, DEVICE), DEVICE, torch.float16) for _ in range(copies)
    ]
    kind, sms = packed[0].kind, torch.cuda.get_device_properties(DEVICE).multi_processor_count
    bases = {rows: _import().heuristics(backend.configs[kind], shape_m=rows, device=DEVICE) for rows in BUCKETS}
    tried = {
        rows: [base, *humming_order.candidates(base, problem_of(inputs, outputs, rows, sms))[:TRIED]]
        for rows, base in bases.items()
    }
    compiled = {
        rows: [compilers.submit(compile_one, kind, config) for config in configs] for rows, configs in tried.items()
    }
    found = []
    for rows, configs in tried.items():
        kernels = [future.result() for future in compiled[rows]]
        own = kernels[0]
        assert own is not None
        x = torch.randn(rows, inputs, device=DEVICE).half()
        expected = torch.empty(rows, outputs, device=DEVICE, dtype=torch.float16)
        backend.launch(own, x, packed[0], expected)
        times = [
            (_time(backend, each, x, packed, expected, ordered=index > 0), config)
            for index, (each, config) in enumerate(zip(kernels, configs, strict=True))
            if each is not None
        ]
        found.append(record(inputs, outputs, rows, times))
        print(inputs, outputs, rows, f"{found[-1]['own_us']:.1f} -> {found[-1]['best_us']:.1f}", flush=True)
    return found


def record(inputs: int, outputs: int, rows: int, times: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """What was found for these rows; the first of `times` is the package's own choice."""
    (own, _), ordered = times[0], times[1:]
    best, config = min(ordered, key=lambda pair: pair[0], default=(float("inf"), {}))
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "bits": SPEC.bits,
        "inputs": inputs, "outputs": outputs, "rows": rows, "buckets": list(BUCKETS[rows]), "ordered": True,
        "own_us": round(own, 2), "best_us": round(best, 2), "tried": len(ordered), "changes": {**UNSET, **config},
        "all": [(round(us, 2), tried) for us, tried in ordered],
    }  # fmt: skip


def _time(
    backend: HummingLinear,
    kernels: torch.Tensor,
    x: torch.Tensor,
    packed: list[HummingPacked],
    expected: torch.Tensor,
    ordered: bool,
) -> float:
    """Microseconds, or infinity where the result is not what humming's own choice gives, or not always the same."""
    out = torch.full_like(expected, float("nan"))
    try:
        backend.launch(kernels, x, packed[0], out)
        error = float((out.float() - expected.float()).norm() / expected.float().norm())
        first = out.clone()
        for _ in range(REPEATS):
            backend.launch(kernels, x, packed[0], out)
            if ordered and not torch.equal(first, out):
                return float("inf")
        if not error < 2e-3:
            return float("inf")
        return time_calls([partial(backend.launch, kernels, x, weight, out) for weight in packed], 8)
    except RuntimeError as error:
        if "CUDA error" in str(error):
            raise
        return float("inf")


def run(keep: Callable[[dict[str, Any]], None], limit: float = 120.0) -> dict[str, Any]:
    """All shapes, as far as the time goes; what is found is written shape by shape."""
    begin = time.monotonic()
    entries: list[dict[str, Any]] = []
    with ThreadPoolExecutor(16) as compilers:
        for shape in command.SHAPES:
            if time.monotonic() - begin > limit:
                break
            inputs, outputs = map(int, shape.split("x"))
            entries += sweep_shape(inputs, outputs, compilers)
            write(entries)
            keep({"entries": entries, "seconds": time.monotonic() - begin})
            torch.cuda.empty_cache()
    return {"entries": entries, "seconds": time.monotonic() - begin}


def write(entries: list[dict[str, Any]]) -> None:
    """Into the shipped table, in the place of what was found on this device before."""
    entries = [entry for entry in entries if entry["best_us"] < float("inf")]
    old = json.loads(TUNING.read_text())["entries"] if TUNING.exists() else []
    devices = {entry["device"] for entry in entries}
    kept = [entry for entry in old if not (entry.get("ordered") and entry["device"] in devices)]
    lines = ",\n".join(
        "  " + json.dumps({key: value for key, value in entry.items() if key != "all"}) for entry in [*kept, *entries]
    )
    TUNING.write_text(f'{{"entries": [\n{lines}\n]}}\n')


if __name__ == "__main__":  # a stage's result, from another machine, into the package
    write(json.loads(Path(sys.argv[1]).read_text())["result"]["entries"])
