"""The fastest parameters for humming's kernels that add in a fixed order, shape by shape and for few, some and many
rows: candidates (inlaid/kernels/humming_order.py) and what the table had are compiled side by side, checked against the
dequantized product and for equal bits, and timed. Writes humming_tuning.json into the package; entries there without
`ordered`, for `--no-deterministic`, are from this file at commit 4609c2b. One stage of bench.py.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from inlaid.checkpoint import QuantSpec, dequantize
from inlaid.kernels import command, humming_order
from inlaid.kernels.humming import OPEN, TUNING, HummingLinear, HummingPacked, _import, tuned_for
from inlaid.kernels.humming_order import Problem
from inlaid.kernels.measure import CACHE, random_weight, time_calls, weight_bytes

# Rows timed -> buckets that the winner serves; what is not known yet first.
BUCKETS = {128: (96, 128), 512: (512,), 2048: (1024, 2048, 4096), 64: (48, 64), 1: (1, 2, 4, 8), 16: (16,),
           256: (192, 256), 32: (24, 32)}  # fmt: skip
BELOW = {1: 0, 16: 8, 32: 16, 64: 32, 128: 64, 256: 128, 512: 256, 2048: 512}
TRIED = 8  # candidates of each
REPEATS = 20
ERROR = 2e-3
DEVICE = torch.device("cuda")
SPEC = QuantSpec(4, 128, True, False)
UNSET = {"num_sms": 0, "multi_cast_size_a": 1}  # what a change must say, lest the bucket's own choice stays


def problem_of(inputs: int, outputs: int, rows: int, sms: int) -> Problem:
    """All rows that the winner will serve."""
    most = OPEN if rows == max(BUCKETS) else BUCKETS[rows][-1]
    return Problem(inputs, outputs, SPEC.group_size, BELOW[rows], most, sms)


def wide(problem: Problem) -> Iterator[dict[str, Any]]:
    """Tiles of many forms for the matrix units of whole warp groups. Each block of a tile's columns reads all of x, so
    that wider tiles, or two side by side that share what they read (multi_cast_size_a), read it less often."""
    heights = (64,) if problem.most <= 64 else (64, 128)
    for height, width, depth in itertools.product(heights, (128, 256), (64, 128)):
        for across in (32, 64):
            for ctas, together, stages in itertools.product((1, 2), (1, 2), (3, 4, 6)):
                stage = depth * (2 * height + width // 2) + width * 4
                threads = 128 + width // across * 32
                fits = ctas * (stages * stage + 4096) <= 220 * 1024 and ctas * threads <= 1024
                accumulators = height * width * 4 * ctas <= 200 * 1024
                if not fits or not accumulators or problem.inputs % depth or problem.outputs % (width * together):
                    continue
                if (stages == 6 and depth == 128) or (stages == 3 and ctas * stage * 4 <= 200 * 1024):
                    continue
                yield {
                    "mma_type": "wgmma", "block_shape": (height, width, depth), "warp_shape": (height, across, depth),
                    "num_stages": stages, "num_ctas_per_sm": ctas, "multi_cast_size_a": together,
                    "use_stream_k": True, "use_tma": True, "use_warp_spec": True,
                }  # fmt: skip


def compile_one(kind: str, config: dict[str, Any]) -> torch.Tensor | None:
    """None where its checks refuse the configuration, or where its blocks could not all be on the device at once: they
    wait for each other."""
    try:
        kernels = _import().prepare(kind, None, [[0, 1 << 30, config]], DEVICE)
        shared = torch.ops.humming.get_kernel_smem_size(int(kernels[2]))
    except Exception:  # noqa: BLE001 - a configuration that its checks refuse is no candidate
        return None
    return kernels if (shared + 1024) * config.get("num_ctas_per_sm", 1) <= 227 * 1024 else None


class _Candidates(HummingLinear):
    """Compiles nothing but what is to be timed."""

    def _compile(self, kind: str, config: Any, device: torch.device) -> None:
        self.configs[kind] = config


class Swept:
    """One shape: its weights, as many copies as no cache holds, and what was compiled for it."""

    def __init__(self, shape: str, compilers: ThreadPoolExecutor) -> None:
        inputs, outputs = map(int, shape.split("x"))
        self.inputs, self.outputs, self.compilers = inputs, outputs, compilers
        self.backend = _Candidates()
        copies = max(2, int(CACHE // weight_bytes(inputs, outputs, SPEC)) + 1)
        weights = [random_weight(inputs, outputs, SPEC, DEVICE) for _ in range(copies)]
        self.exact = dequantize(weights[0]).half()
        self.packed = [self.backend.prepare(weight, DEVICE, torch.float16) for weight in weights]
        self.kind = self.packed[0].kind
        self.tried: list[tuple[dict[str, Any], Future[torch.Tensor | None]]] = []

    def compile(self, rows: int, widely: bool = False) -> None:
        """Start on the candidates for so many rows, which are timed next."""
        config = self.backend.configs[self.kind]
        base = _import().heuristics(config, shape_m=rows, device=DEVICE)
        found = tuned_for(config, torch.cuda.get_device_name(), ordered=True).get(rows)
        known = [] if found is None else [{**base, **found}]
        sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
        problem = problem_of(self.inputs, self.outputs, rows, sms)
        near = list(wide(problem)) if widely else humming_order.candidates(base, problem)[:TRIED]
        configs = [base, *known, *(one for one in near if one not in (base, *known))]
        self.tried = [(one, self.compilers.submit(compile_one, self.kind, one)) for one in configs]

    def time(self, rows: int) -> dict[str, Any]:
        x = torch.randn(rows, self.inputs, device=DEVICE).half()
        expected = x.float() @ self.exact.float()
        times = []
        for config, compiled in self.tried:
            kernels = compiled.result()
            if kernels is not None:
                times.append((_time(self.backend, kernels, x, self.packed, expected), config))
        return record(self.inputs, self.outputs, rows, times)


def record(inputs: int, outputs: int, rows: int, times: Sequence[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """What was found for these rows; the first of `times` is the package's own choice of parameters."""
    best, config = min(times, key=lambda pair: pair[0], default=(float("inf"), {}))
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "bits": SPEC.bits,
        "inputs": inputs, "outputs": outputs, "rows": rows, "buckets": list(BUCKETS[rows]), "ordered": True,
        "own_us": round(times[0][0], 2) if times else None, "best_us": round(best, 2), "tried": len(times),
        "changes": {**UNSET, **config}, "all": [(round(us, 2), tried) for us, tried in times],
    }  # fmt: skip


def _time(
    backend: HummingLinear, kernels: torch.Tensor, x: torch.Tensor, packed: list[HummingPacked], expected: torch.Tensor
) -> float:
    """Microseconds, or infinity where the result is wrong, or not always the same."""
    out = torch.full_like(expected, float("nan"), dtype=torch.float16)
    try:
        backend.launch(kernels, x, packed[0], out)
        error = float((out.float() - expected).norm() / expected.norm())
        first = out.clone()
        for _ in range(REPEATS):
            backend.launch(kernels, x, packed[0], out)
            if not torch.equal(first, out):
                return float("inf")
        if not error < ERROR:
            return float("inf")
        return time_calls([partial(backend.launch, kernels, x, weight, out) for weight in packed], 8)
    except RuntimeError as error:
        if "CUDA error" in str(error):
            raise
        return float("inf")


def order(shapes: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(rows, shape), in the order of BUCKETS."""
    return ((rows, shape) for rows in BUCKETS for shape in shapes)


def run(keep: Callable[[dict[str, Any]], None], limit: float = 85.0, widely: tuple[int, ...] = ()) -> dict[str, Any]:
    """All shapes, as far as the time goes; what is found is written as it is found. `widely`: only these numbers of
    rows, with candidates of all forms."""
    begin = time.monotonic()
    entries: list[dict[str, Any]] = []
    with ThreadPoolExecutor(16) as compilers:
        shapes = {name: Swept(name, compilers) for name in command.SHAPES}
        for rows, name in order(command.SHAPES):
            if widely and rows not in widely:
                continue
            if time.monotonic() - begin > limit:
                break
            if not entries or entries[-1]["rows"] != rows:
                for each in shapes.values():
                    each.compile(rows, rows in widely)
            entries.append(shapes[name].time(rows))
            print(name, rows, entries[-1]["own_us"], "->", entries[-1]["best_us"], flush=True)
            write(entries)
            keep({"entries": entries, "seconds": time.monotonic() - begin})
    return {"entries": entries, "seconds": time.monotonic() - begin}


def write(entries: list[dict[str, Any]]) -> None:
    """Into the shipped table, in the place of what was found for the same rows on this device before."""

    def place(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry.get(key) for key in ("device", "bits", "inputs", "outputs", "rows", "ordered"))

    entries = [entry for entry in entries if entry["best_us"] < float("inf")]
    old = json.loads(TUNING.read_text())["entries"] if TUNING.exists() else []
    new = {place(entry) for entry in entries}
    lines = ",\n".join(
        "  " + json.dumps({key: value for key, value in entry.items() if key != "all"})
        for entry in (*(entry for entry in old if place(entry) not in new), *entries)
    )
    TUNING.write_text(f'{{"entries": [\n{lines}\n]}}\n')


if __name__ == "__main__":  # a stage's result, from another machine, into the package
    write(json.loads(Path(sys.argv[1]).read_text())["result"]["entries"])
