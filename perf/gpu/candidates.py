"""Parameters of humming's kernels that a sweep tries (humming_sweep.py).

A slice of a sum that waits for another costs time, so kernels with fewer slices or smaller tiles than the package
chooses may be faster. `near` lists kernels like the package's choice, `wide` kernels of all tile forms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from inlaid.kernels.humming_schedule import Config, Problem, schedule

CUTS = (4, 2)  # slices of the most divided tile that a candidate is held to
UNEVEN = 1.5  # work of the busiest multiprocessor over the mean; above it a candidate is not tried


def near(base: Config, problem: Problem) -> list[dict[str, Any]]:
    """Return the package's choice and kernels like it: fewer blocks a multiprocessor, fewer slices, smaller tiles."""
    found: list[dict[str, Any]] = []
    for tile in (base, *_smaller(base, problem)):
        for ctas in dict.fromkeys((tile.get("num_ctas_per_sm", 1), 1)):
            config = {**tile, "num_ctas_per_sm": ctas}
            tiles, whole = problem.row_tiles(config), {**config, "use_stream_k": False}
            made = schedule(config, problem, tiles)
            found.append(config)
            for cut in CUTS:
                held = _held(config, problem, cut) if cut < made.slices else None
                if held is not None and held not in found:
                    found.append(held)
            if made.slices > 1 and 2 * schedule(whole, problem, tiles).blocks > problem.sms:
                found.append(whole)
    return found


def _smaller(base: Config, problem: Problem) -> Iterator[dict[str, Any]]:
    """Yield kernels of smaller tiles: more tiles fill the device without being cut often."""
    rows, width, depth = base["block_shape"]
    if base.get("mma_type") == "mma":
        if width > 64 and base["warp_shape"][1] <= 64:
            yield {**base, "block_shape": (rows, 64, depth)}
    elif problem.most <= 64 and problem.inputs % 128 == 0 and problem.outputs % 64 == 0:
        height = -(-problem.most // 16) * 16
        yield {
            "mma_type": "mma", "block_shape": (height, 64, 128), "warp_shape": (height, 32, 64), "num_stages": 4,
            "num_ctas_per_sm": 2, "use_stream_k": True, "use_tma": False, "use_warp_spec": False,
        }  # fmt: skip
    elif rows >= 128 and rows == base["warp_shape"][0]:
        yield {**base, "block_shape": (rows // 2, width, depth), "warp_shape": (rows // 2, *base["warp_shape"][1:])}


def _held(config: Config, problem: Problem, slices: int) -> dict[str, Any] | None:
    """Return the kernel on the most multiprocessors that cut no tile into more slices: on fewer, runs are longer."""
    for sms in range(problem.sms, problem.sms // 3, -1):
        tried = dict(config) if sms == problem.sms else {**config, "num_sms": sms}
        if schedule(tried, problem, problem.row_tiles(tried)).slices <= slices:
            return tried
    return None


def wide(problem: Problem) -> Iterator[dict[str, Any]]:
    """Yield kernels of all tile forms, up to four blocks a multiprocessor, as far as few registers are spilled.

    Forms of warp groups (wgmma), also with two groups that divide a block's K, and of single warps (mma), which may be
    64 columns narrow. Left out: blocks that share what they read of x (multi_cast_size_a), which were slower for every
    shape; warps of 16 columns, which the package has for other types of x only."""
    for config in itertools.chain(_of_warp_groups(problem), _of_warps(problem)):
        _, width, depth = config["block_shape"]
        fits = problem.inputs % depth == 0 and problem.outputs % width == 0
        if fits and _share(config, problem) <= UNEVEN:
            yield config


def _of_warp_groups(problem: Problem) -> Iterator[dict[str, Any]]:
    """Yield wgmma kernels whose registers and shared memory suffice."""
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
    """Yield mma kernels."""
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


def _share(config: Config, problem: Problem) -> float:
    """Return the work of the busiest multiprocessor over the mean."""
    _, width, depth = config["block_shape"]
    tiles, ctas = problem.row_tiles(config), config["num_ctas_per_sm"]
    busiest = schedule(config, problem, tiles).iterations * depth * width * ctas
    return float(busiest * problem.sms / (tiles * problem.inputs * problem.outputs))
