"""Find the fastest parameters of humming's kernels, shape by shape and for few, some and many rows. Stages of bench.py.

Candidates (candidates.py) and what the table had are compiled side by side, checked against the dequantized product
and for equal bits, and timed; the fastest go into inlaid/kernels/humming_tuning.json. `run` times whole products whose
sums are added in a fixed order. `run_parts` times products together with the norm that reads them: whole, and in parts
that the norm adds; where parts are faster, the table gets an entry with `parts`. Entries without `ordered`, which serve
--no-deterministic, are from commit 4609c2b.

    python -m perf.gpu.humming_sweep DIR/sweep.json     # write a result from another machine into the table
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from inlaid.checkpoint import QuantSpec, dequantize
from inlaid.files import write_atomically
from inlaid.kernels import command, early, fused_triton
from inlaid.kernels.backend import Parts
from inlaid.kernels.humming import OPEN, TUNING, HummingLinear, HummingPacked, parts_of, tuned_for
from inlaid.kernels.humming_patches import IN_PARTS, load
from inlaid.kernels.humming_schedule import MOST_SLICES, Problem
from inlaid.kernels.measure import CACHE, random_weight, time_calls, weight_bytes
from perf.gpu import Keep
from perf.gpu.candidates import near, wide

# Rows timed -> buckets that the winner serves; rows of which least is known come first.
BUCKETS: Mapping[int, tuple[int, ...]] = MappingProxyType({
    128: (96, 128), 512: (512,), 2048: (1024, 2048, 4096), 64: (48, 64), 1: (1, 2, 4, 8), 16: (16,), 256: (192, 256),
    32: (24, 32),
})  # fmt: skip
BELOW: Mapping[int, int] = MappingProxyType({1: 0, 16: 8, 32: 16, 64: 32, 128: 64, 256: 128, 512: 256, 2048: 512})
TRIED = 8  # candidates of a shape and number of rows
REPEATS = 20
ERROR = 2e-3  # relative
DEVICE = torch.device("cuda")
SPEC = QuantSpec(4, 128, True, False)
UNSET: Mapping[str, Any] = MappingProxyType({  # written into every entry, or the package's choice for the bucket stays
    "num_sms": 0, "multi_cast_size_a": 1, "raster_group_m": 1, "use_tma_c": None,
})  # fmt: skip
BEFORE_NORMS = ("4096x4096", "11008x4096", "14336x4096")
PART_ROWS = (64, 256, 128, 32)
EPS = 1e-5


def problem_of(inputs: int, outputs: int, rows: int, sms: int) -> Problem:
    """Return the layer for all rows that the winner will serve."""
    most = OPEN if rows == max(BUCKETS) else BUCKETS[rows][-1]
    return Problem(inputs, outputs, SPEC.group_size, BELOW[rows], most, sms)


def compile_one(kind: str, config: dict[str, Any]) -> torch.Tensor | None:
    """Compile a kernel; return None where the package refuses the parameters or its blocks do not all fit the device.

    Blocks wait for each other, so all must be on the device at once."""
    try:
        kernels = load().prepare(kind, None, [[0, 1 << 30, config]], DEVICE)
        shared = torch.ops.humming.get_kernel_smem_size(int(kernels[2]))
    except Exception:  # noqa: BLE001 - parameters that the package refuses are no candidate
        return None
    return kernels if (shared + 1024) * config.get("num_ctas_per_sm", 1) <= 227 * 1024 else None


class _Uncompiled(HummingLinear):
    """The backend without kernels of its own: the sweep compiles what it times."""

    def _compile(self, kind: str, config: Any, device: torch.device) -> None:
        self.configs[kind] = config


class Swept:
    """One shape: more copies of its weight than the L2 cache holds, and the kernels compiled for it."""

    def __init__(self, shape: str, compilers: ThreadPoolExecutor) -> None:
        inputs, outputs = map(int, shape.split("x"))
        self.inputs, self.outputs, self.compilers = inputs, outputs, compilers
        self.backend = _Uncompiled()
        copies = max(2, int(CACHE // weight_bytes(inputs, outputs, SPEC)) + 1)
        weights = [random_weight(inputs, outputs, SPEC, DEVICE) for _ in range(copies)]
        self.exact = dequantize(weights[0]).half()
        self.packed = [self.backend.prepare(weight, DEVICE, torch.float16) for weight in weights]
        self.kind = self.packed[0].kind
        self.tried: dict[int, list[tuple[dict[str, Any], Future[torch.Tensor | None]]]] = {}

    def compile(self, rows: int, widely: bool = False, before_norm: bool = False) -> None:
        """Start compiling the candidates for `rows` rows; those before a norm may not store by TMA, to leave parts."""
        config = self.backend.configs[self.kind]
        base = load().heuristics(config, shape_m=rows, device=DEVICE)
        found = tuned_for(config, DEVICE, ordered=True, parts=False).get(rows)
        known = [] if found is None else [{**base, **found}]
        sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
        problem = problem_of(self.inputs, self.outputs, rows, sms)
        others = near(base, problem)[:TRIED]
        if widely:
            others = [*wide(problem), *(others if before_norm else ())]
        if before_norm:
            others = [{**one, "use_tma_c": False} for one in (*known, *others)]
        configs = [base, *known]
        configs += [one for index, one in enumerate(others) if one not in configs and one not in others[:index]]
        early_too = {"use_pdl": True} if before_norm and early.wanted() else {}
        self.tried[rows] = [
            (one, self.compilers.submit(compile_one, self.kind, {**one, **early_too})) for one in configs
        ]

    def time(self, rows: int) -> dict[str, Any]:
        """Check and time the candidates as whole products."""
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
        """Check and time the candidates with the norm that reads them: records of whole products and of parts."""
        x, residual = (torch.randn(rows, width, device=DEVICE).half() for width in (self.inputs, self.outputs))
        norm_D = torch.rand(self.outputs, device=DEVICE).half() + 0.5
        out, layer = torch.full_like(residual, float("nan")), self.backend.configs[self.kind]
        expected = x.float() @ self.exact.float() + residual.float()
        expected = F.rms_norm(expected, norm_D.shape, norm_D.float(), EPS)
        product = torch.empty(MOST_SLICES, rows, self.outputs, dtype=torch.float16, device=DEVICE)
        whole: list[tuple[float, dict[str, Any]]] = []
        in_parts: list[tuple[float, dict[str, Any]]] = []
        for config, compiled in self.tried.pop(rows):
            kernels = compiled.result()
            if kernels is None:
                continue
            parts = parts_of(config, layer, rows, config.get("num_sms", 0), DEVICE)
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
    """Return the table's entry for these rows and shape.

    The first of `times` is the package's own choice of parameters. `whole` makes it an entry for products in parts: the
    best time of whole ones, which it is held against."""
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
    """Return microseconds, or infinity where the result is wrong or not always the same."""
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
    """Return pairs (rows, shape), all shapes of a number of rows before the next number."""
    return ((rows, shape) for rows in BUCKETS for shape in shapes)


def run(keep: Keep, limit: float = 85.0, widely: tuple[int, ...] = ()) -> dict[str, Any]:
    """Sweep all shapes for `limit` seconds and write entries as they are found.

    `widely`: only these numbers of rows, with candidates of all forms."""
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


def run_parts(keep: Keep, limit: float = 150.0) -> dict[str, Any]:
    """Sweep products that a norm reads, whole and in parts, with candidates of all forms, for `limit` seconds.

    Whole products of the other shapes are swept at the first number of rows."""
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
            figures = [f"{entry['own_us']} -> {entry['best_us']} of {entry['tried']}" for entry in found]
            print(f"{time.monotonic() - begin:4.0f} s", name, rows, ", in parts ".join(figures), flush=True)
            entries += found
            write(entries)
            keep({"entries": entries, "seconds": time.monotonic() - begin})
        compilers.shutdown(wait=False, cancel_futures=True)
    return {"entries": entries, "seconds": time.monotonic() - begin}


def write(entries: list[dict[str, Any]]) -> None:
    """Write entries into the shipped table, in place of those of the same shape, rows and device.

    Of entries for parts only those that are faster than whole products are kept."""

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
    write_atomically(TUNING, f'{{"entries": [\n{lines}\n]}}\n'.encode())  # a stage may be killed in the middle


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text())["result"]["entries"])
