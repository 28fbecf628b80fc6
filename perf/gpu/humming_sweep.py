"""Better parameters for humming's kernels than its own choice, shape by shape and for few, some and many rows:
candidates near its choice are compiled side by side, checked against it, and timed. Writes humming_tuning.json into the
package. One stage of bench.py.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from inlaid.checkpoint import QuantSpec
from inlaid.kernels import command
from inlaid.kernels.humming import TUNING, HummingLinear, HummingPacked, _import
from inlaid.kernels.measure import CACHE, random_weight, time_calls, weight_bytes

BUCKETS = {1: [1, 2, 4, 8], 16: [16], 64: [64]}  # rows timed -> buckets that the winner serves
GAIN = 0.97  # a winner takes at most this share of the time of humming's own choice
DEVICE = torch.device("cuda")
SPEC = QuantSpec(4, 128, True, False)


def candidates(base: dict[str, Any]) -> list[dict[str, Any]]:
    """Changes to a configuration; those that humming refuses drop out when they are compiled."""
    m = base["block_shape"][0]
    changes: list[dict[str, Any]] = [{"num_ctas_per_sm": ctas} for ctas in (1, 2, 3, 4)]
    changes += [{"num_stages": stages} for stages in (3, 5, 6)]
    changes += [{"num_stages": 3, "num_ctas_per_sm": 3}]
    if base["mma_type"] == "mma":
        tiles = (
            ((256, 128), (64, 32)), ((128, 64), (64, 32)), ((128, 128), (32, 64)), ((256, 64), (64, 32)),
            ((64, 128), (64, 32)), ((128, 256), (64, 64)),
        )  # fmt: skip
        for block, warp in tiles:
            changes.append({"block_shape": (m, *block), "warp_shape": (m, *warp)})
    else:
        for block in ((256, 64), (128, 128)):
            changes.append({"block_shape": (m, *block), "warp_shape": (m, 32, 64)})
        changes.append({"block_shape": (m, 128, 128), "warp_shape": (m, 32, 128)})
        changes.append({"block_shape": (m, 256, 64), "warp_shape": (m, 32, 64), "num_ctas_per_sm": 1})
        changes.append({"use_tma": False, "use_warp_spec": False})
    return [change for change in changes if any(base.get(key) != value for key, value in change.items())]


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
    kind = packed[0].kind
    found = []
    for rows, buckets in BUCKETS.items():
        base = _import().heuristics(backend.configs[kind], shape_m=rows, device=DEVICE)
        changes = candidates(base)
        kernels = list(compilers.map(lambda change: compile_one(kind, {**base, **change}), [{}, *changes]))  # noqa: B023
        assert kernels[0] is not None
        x = torch.randn(rows, inputs, device=DEVICE).half()
        expected = torch.empty(rows, outputs, device=DEVICE, dtype=torch.float16)
        backend.launch(kernels[0], x, packed[0], expected)
        times = [
            (_time(backend, compiled, x, packed, expected), change)
            for compiled, change in zip(kernels, [{}, *changes], strict=True)
            if compiled is not None
        ]
        own, (best, change) = times[0][0], min(times, key=lambda pair: pair[0])
        found.append(
            {
                "device": torch.cuda.get_device_name(), "bits": 4, "inputs": inputs, "outputs": outputs, "rows": rows,
                "buckets": buckets, "own_us": own, "best_us": best, "tried": len(times), "changes": change,
                "all": [(round(us, 2), tried) for us, tried in times],
            }
        )  # fmt: skip
        print(inputs, outputs, rows, f"{own:.1f} -> {best:.1f}", change, flush=True)
    return found


def _time(
    backend: HummingLinear, kernels: torch.Tensor, x: torch.Tensor, packed: list[HummingPacked], expected: torch.Tensor
) -> float:
    """Microseconds, or infinity where the result is not what humming's own choice gives."""
    out = torch.full_like(expected, float("nan"))
    try:
        for _ in range(3):
            backend.launch(kernels, x, packed[0], out)
        error = float((out.float() - expected.float()).norm() / expected.float().norm())
        if not error < 2e-3:
            return float("inf")
        return time_calls([partial(backend.launch, kernels, x, weight, out) for weight in packed], 8)
    except RuntimeError as error:
        if "CUDA error" in str(error):
            raise
        return float("inf")


def run(limit: float = 65.0) -> dict[str, Any]:
    """All shapes, as far as the time goes; what is found is written shape by shape."""
    begin = time.monotonic()
    entries: list[dict[str, Any]] = []
    with ThreadPoolExecutor(16) as compilers:
        for shape in command.SHAPES:
            if time.monotonic() - begin > limit:
                break
            inputs, outputs = map(int, shape.split("x"))
            entries += sweep_shape(inputs, outputs, compilers)
            write([entry for entry in entries if entry["best_us"] < GAIN * entry["own_us"]])
            torch.cuda.empty_cache()
    return {"entries": entries, "seconds": time.monotonic() - begin}


def write(entries: list[dict[str, Any]]) -> None:
    lines = ",\n".join(
        "  " + json.dumps({key: value for key, value in entry.items() if key != "all"}) for entry in entries
    )
    TUNING.write_text(f'{{"entries": [\n{lines}\n]}}\n')
