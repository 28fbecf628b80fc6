"""The fastest parameters for humming's kernels that add in a fixed order, shape by shape and for few, some and many
rows: candidates (inlaid/kernels/humming_order.py) and what the table had are compiled side by side, checked against the
dequantized product and for equal bits, and timed. Writes humming_tuning.json into the package; entries there without
`ordered`, for `--no-deterministic`, are from this file at commit 4609c2b. `run_parts` times products that a norm reads
together with the norm: whole, and in parts that it adds; where parts are faster, the table says so. Stages of bench.py.
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
import torch.nn.functional as F

from inlaid.checkpoint import QuantSpec, dequantize
from inlaid.files import write_atomically
from inlaid.kernels import command, early, fused_triton, humming_order
from inlaid.kernels.backend import Parts
from inlaid.kernels.humming import OPEN, TUNING, HummingLinear, HummingPacked, _import, laid_out, tuned_for
from inlaid.kernels.humming_order import IN_PARTS, Problem, schedule
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
UNSET: dict[str, Any] = {  # what a change must say, lest the bucket's own choice stays
    "num_sms": 0, "multi_cast_size_a": 1, "raster_group_m": 1, "use_tma_c": None,
}  # fmt: skip
BEFORE_NORMS = ("4096x4096", "11008x4096", "14336x4096")
PART_ROWS = (64, 256, 128, 32)
UNEVEN = 1.5  # times the work of a multiprocessor if all had the same; more is not tried
EPS = 1e-5


def problem_of(inputs: int, outputs: int, rows: int, sms: int) -> Problem:
    """All rows that the winner will serve."""
    most = OPEN if rows == max(BUCKETS) else BUCKETS[rows][-1]
    return Problem(inputs, outputs, SPEC.group_size, BELOW[rows], most, sms)


def wide(problem: Problem) -> Iterator[dict[str, Any]]:
    """Tiles of many forms: of the matrix units of whole warp groups, also with two groups that divide a block's K; and
    of those of single warps, which may be 64 columns narrow. Up to four blocks on a multiprocessor, as far as registers
    are not spilled much. Blocks side by side that share what they read of x (multi_cast_size_a) were slower everywhere;
    warps of 16 columns the package has for other types of x only."""
    for config in itertools.chain(_of_warp_groups(problem), _of_warps(problem)):
        _, width, depth = config["block_shape"]
        fits = problem.inputs % depth == 0 and problem.outputs % width == 0
        if fits and _share(config, problem) <= UNEVEN:
            yield config


def _of_warp_groups(problem: Problem) -> Iterator[dict[str, Any]]:
    heights = (32,) if problem.most <= 32 else (64,) if problem.most <= 64 else (64, 128)
    forms = ((128, 32, 64, 1), (128, 32, 128, 1), (128, 32, 128, 2), (256, 32, 64, 1), (256, 64, 64, 1),
             (256, 32, 128, 1), (256, 64, 128, 1), (256, 64, 128, 2))  # fmt: skip
    for height, (width, across, depth, groups) in itertools.product(heights, forms):
        threads = 128 + width // across * 32 * groups
        stage = depth * (2 * height + width // 2) + width * 4
        for ctas, stages in itertools.product((1, 2, 3, 4), (3, 4, 6)):
            registers = 65536 // (threads * ctas) // 8 * 8
            fits = registers >= height // 2 + 32 + 16 * groups and height * width * 4 * groups * ctas <= 200 * 1024
            most = (218 * 1024 // ctas - 4096) // stage  # stages
            if not fits or stages > most or ctas * threads > 1024:
                continue
            if (stages == 6 and (depth == 128 or ctas > 2)) or (stages == 3 and most > 3):
                continue
            yield {
                "mma_type": "wgmma", "block_shape": (height, width, depth), "num_stages": stages,
                "warp_shape": (height, across, depth // groups), "num_ctas_per_sm": ctas,
                "use_stream_k": True, "use_tma": True, "use_warp_spec": True,
            }  # fmt: skip


def _of_warps(problem: Problem) -> Iterator[dict[str, Any]]:
    height = 32 if problem.most <= 32 else 64
    forms = ((64, 128, 64, (2, 3, 4)), (64, 64, 32, (2, 3, 4)), (64, 256, 64, (1,)), (128, 128, 64, (1, 2)))
    for width, depth, inner, many in forms:
        for ctas in many:
            stages = 4 if ctas * 4 * (depth * (2 * height + width // 2) + width * 4) <= 200 * 1024 else 3
            yield {
                "mma_type": "mma", "block_shape": (height, width, depth), "warp_shape": (height, 32, inner),
                "num_stages": stages, "num_ctas_per_sm": ctas, "use_stream_k": True, "use_tma": False,
                "use_warp_spec": False,
            }  # fmt: skip


def _share(config: dict[str, Any], problem: Problem) -> float:
    """The work of the busiest multiprocessor, where 1 is the same for all."""
    _, width, depth = config["block_shape"]
    tiles, ctas = problem.row_tiles(config), config["num_ctas_per_sm"]
    busiest = schedule(config, problem, tiles).iterations * depth * width * ctas
    return busiest * problem.sms / (tiles * problem.inputs * problem.outputs)


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
        self.tried: dict[int, list[tuple[dict[str, Any], Future[torch.Tensor | None]]]] = {}

    def compile(self, rows: int, widely: bool = False, before_norm: bool = False) -> None:
        """Start on the candidates for so many rows. What is tried in parts may not store by TMA."""
        config = self.backend.configs[self.kind]
        base = _import().heuristics(config, shape_m=rows, device=DEVICE)
        found = tuned_for(config, DEVICE, ordered=True, parts=False).get(rows)
        known = [] if found is None else [{**base, **found}]
        sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
        problem = problem_of(self.inputs, self.outputs, rows, sms)
        near = humming_order.candidates(base, problem)[:TRIED]
        if widely:
            near = [*wide(problem), *(near if before_norm else ())]
        if before_norm:
            near = [{**one, "use_tma_c": False} for one in (*known, *near)]
        configs = [base, *known]
        configs += [one for index, one in enumerate(near) if one not in configs and one not in near[:index]]
        early_too = {"use_pdl": True} if before_norm and early.wanted() else {}
        self.tried[rows] = [
            (one, self.compilers.submit(compile_one, self.kind, {**one, **early_too})) for one in configs
        ]

    def time(self, rows: int) -> dict[str, Any]:
        x = torch.randn(rows, self.inputs, device=DEVICE).half()
        expected = x.float() @ self.exact.float()
        out = torch.full_like(expected, float("nan"), dtype=torch.float16)
        times = []
        for config, compiled in self.tried.pop(rows):
            kernels = compiled.result()
            if kernels is not None:
                run = partial(self.backend.launch, kernels, x, out_TN=out)
                times.append((_time(run, out, self.packed, expected), config))
        return record(self.inputs, self.outputs, rows, times)

    def time_before_norm(self, rows: int) -> list[dict[str, Any]]:
        """With the norm that reads the product: whole ones, and in parts."""
        x, residual = (torch.randn(rows, width, device=DEVICE).half() for width in (self.inputs, self.outputs))
        norm_D = torch.rand(self.outputs, device=DEVICE).half() + 0.5
        out, layer = torch.full_like(residual, float("nan")), self.backend.configs[self.kind]
        expected = x.float() @ self.exact.float() + residual.float()
        expected = F.rms_norm(expected, norm_D.shape, norm_D.float(), EPS)
        product = torch.empty(humming_order.MOST_SLICES, rows, self.outputs, dtype=torch.float16, device=DEVICE)
        whole: list[tuple[float, dict[str, Any]]] = []
        in_parts: list[tuple[float, dict[str, Any]]] = []
        for config, compiled in self.tried.pop(rows):
            kernels = compiled.result()
            if kernels is None:
                continue
            parts = laid_out(config, layer, rows, config.get("num_sms", 0), DEVICE)
            for times, how in ((whole, None), *(((in_parts, parts),) if parts is not None else ())):

                def run(weight: HummingPacked, how: Parts | None = how, kernels: torch.Tensor = kernels) -> None:
                    self.backend.launch(kernels, x, weight, product[0], 1 if how is None else IN_PARTS)
                    lies = product[0] if how is None else product[: how.most]
                    fused_triton.norm(lies, norm_D, EPS, out, residual, keep=False, parts=how)

                product.fill_(float("nan"))
                times.append((_time(run, out, self.packed, expected), config))
        own = record(self.inputs, self.outputs, rows, whole)
        return [own, record(self.inputs, self.outputs, rows, in_parts, own["best_us"])]


def record(
    inputs: int, outputs: int, rows: int, times: Sequence[tuple[float, dict[str, Any]]], whole: float | None = None
) -> dict[str, Any]:
    """What was found for these rows; the first of `times` is the package's own choice of parameters. Of products in
    parts `whole` is the best time of whole ones."""
    best, config = min(times, key=lambda pair: pair[0], default=(float("inf"), {}))
    own = whole if whole is not None else times[0][0] if times else None
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "bits": SPEC.bits,
        "inputs": inputs, "outputs": outputs, "rows": rows, "buckets": list(BUCKETS[rows]), "ordered": True,
        **({} if whole is None else {"parts": True}),
        "own_us": None if own is None else round(own, 2), "best_us": round(best, 2), "tried": len(times),
        "changes": {**UNSET, **config}, "all": [(round(us, 2), tried) for us, tried in times],
    }  # fmt: skip


def _time(
    run: Callable[[HummingPacked], None], out: torch.Tensor, packed: list[HummingPacked], expected: torch.Tensor
) -> float:
    """Microseconds, or infinity where the result is wrong, or not always the same."""
    try:
        out.fill_(float("nan"))
        run(packed[0])
        error = float((out.float() - expected).norm() / expected.norm())
        first = out.clone()
        for _ in range(REPEATS):
            run(packed[0])
            if not torch.equal(first, out):
                return float("inf")
        if not error < ERROR:
            return float("inf")
        return time_calls([partial(run, weight) for weight in packed], 8)
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


def run_parts(keep: Callable[[dict[str, Any]], None], limit: float = 150.0) -> dict[str, Any]:
    """Products that a norm reads, whole and in parts, with candidates of all forms; and whole ones of the other shapes
    at as many rows as come first. As far as the time goes."""
    begin = time.monotonic()
    entries: list[dict[str, Any]] = []
    others = [name for name in command.SHAPES if name not in BEFORE_NORMS]
    work = [(rows, name) for rows in PART_ROWS for name in (*BEFORE_NORMS, *(others if rows == PART_ROWS[0] else ()))]
    with ThreadPoolExecutor(16) as compilers:
        shapes = {name: Swept(name, compilers) for name in command.SHAPES}
        for rows, name in work:
            shapes[name].compile(rows, True, name in BEFORE_NORMS)
        for rows, name in work:
            if time.monotonic() - begin > limit:
                break
            found = shapes[name].time_before_norm(rows) if name in BEFORE_NORMS else [shapes[name].time(rows)]
            said = [f"{entry['own_us']} -> {entry['best_us']} of {entry['tried']}" for entry in found]
            print(f"{time.monotonic() - begin:4.0f} s", name, rows, ", in parts ".join(said), flush=True)
            entries += found
            write(entries)
            keep({"entries": entries, "seconds": time.monotonic() - begin})
        compilers.shutdown(wait=False, cancel_futures=True)
    return {"entries": entries, "seconds": time.monotonic() - begin}


def write(entries: list[dict[str, Any]]) -> None:
    """Into the shipped table, in the place of what was found for the same rows on this device before; of parts only
    what is faster than whole products."""

    def place(entry: dict[str, Any]) -> tuple[Any, ...]:
        names = ("device", "bits", "inputs", "outputs", "rows", "ordered", "parts")
        return tuple(entry.get(name, False) for name in names)

    entries = [entry for entry in entries if entry["best_us"] < float("inf")]
    old = json.loads(TUNING.read_text())["entries"] if TUNING.exists() else []
    new = {place(entry) for entry in entries}
    lines = ",\n".join(
        "  " + json.dumps({key: value for key, value in entry.items() if key != "all"})
        for entry in (*(entry for entry in old if place(entry) not in new), *entries)
        if not entry.get("parts") or entry["best_us"] < entry["own_us"]
    )
    write_atomically(TUNING, f'{{"entries": [\n{lines}\n]}}\n'.encode())  # a stage's time may end in the middle


if __name__ == "__main__":  # a stage's result, from another machine, into the package
    write(json.loads(Path(sys.argv[1]).read_text())["result"]["entries"])
