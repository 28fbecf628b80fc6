"""In which order humming's kernels add the parts of a sum, and parameters with which it is always the same order.

Its stream-K gives every block a run of K tiles, so that an output tile may be summed by several blocks ("slices"). Of
two slices the first is stored and the second added; without TMA stores up to three are added one after the other; of
more, those after the first are added as they arrive, in half precision, and then the same batch need not give the same
bits twice. How many slices a tile gets is decided by its scheduler alone, which `slices` repeats, so this is known
before anything is compiled. Called by humming.py and by the sweep that times the candidates (perf/gpu).

Shapes: K inputs, N outputs; a configuration is the package's dict of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MOST_SLICES = 10  # the package bounds them so
LAST_ROWS = 8192  # of the bucket without an end
DEQUANTIZING = 64  # what unpacking a tile of weights costs, in rows of its product


@dataclass(frozen=True)
class Problem:
    """A bucket of rows (above `below`, up to `most`) of a linear layer on a device of `sms` multiprocessors."""

    inputs: int
    outputs: int
    group: int
    below: int
    most: int
    sms: int

    def row_tiles(self, config: dict[str, Any]) -> range:
        """How many tiles of rows there may be."""
        height = config["block_shape"][0] * config.get("multi_cast_size_b", 1)
        return range(self.below // height + 1, -(-min(self.most, LAST_ROWS) // height) + 1)


@dataclass(frozen=True)
class Schedule:
    """What the scheduler makes of a launch."""

    slices: int  # the most that one output tile is cut into
    iterations: int  # K tiles of the busiest block
    blocks: int  # blocks with work


def schedule(config: dict[str, Any], problem: Problem, row_tiles: int) -> Schedule:
    """Output tiles in whole waves go to blocks whole; what remains is cut into equal runs of K tiles."""
    _, width, depth = config["block_shape"]
    together = config.get("multi_cast_size_a", 1)  # blocks side by side that share their rows
    cluster = together * config.get("multi_cast_size_b", 1)
    groups = (config.get("num_sms") or problem.sms) * config.get("num_ctas_per_sm", 1) // cluster
    tiles, k_tiles = row_tiles * (problem.outputs // width // together), problem.inputs // depth
    if not config.get("use_stream_k", True):
        return Schedule(1, -(-tiles // groups) * k_tiles, min(tiles, groups) * cluster)
    alignment = max(1, problem.group // depth)
    k_tiles = -(-k_tiles // alignment) * alignment
    cut = tiles
    if tiles > groups:
        cut = tiles % groups
        if cut and cut * 10 <= groups:
            cut += groups
    whole = (tiles - cut) // groups
    run = max(-(-cut * k_tiles // groups), -(-(k_tiles - 1) // (MOST_SLICES - 1)))
    step = alignment // math.gcd(alignment, config.get("num_stages", 2)) * config.get("num_stages", 2)
    run = -(-run // step) * step
    slices = max(((at + k_tiles - 1) // run - at // run + 1 for at in range(0, cut * k_tiles, k_tiles)), default=1)
    blocks = groups if whole else -(-cut * k_tiles // run)
    return Schedule(slices, whole * k_tiles + min(run, cut * k_tiles), blocks * cluster)


def keeps_order(config: dict[str, Any], problem: Problem) -> bool:
    """Whether every sum of every number of rows of the bucket is added in a fixed order."""
    stores_by_tma = config.get("use_tma_c")
    stores_by_tma = config.get("use_tma", False) if stores_by_tma is None else stores_by_tma
    most = 2 if stores_by_tma else 3
    return all(schedule(config, problem, tiles).slices <= most for tiles in problem.row_tiles(config))


def load(config: dict[str, Any], problem: Problem) -> float:
    """A guess at the time: K tiles of the busiest multiprocessor times the work of each, over the bucket's rows. The
    older matrix instructions run at half the rate."""
    rows, width, depth = config["block_shape"]
    rows *= 2 if config.get("mma_type") == "mma" else 1
    total = 0.0
    for tiles in problem.row_tiles(config):
        made = schedule(config, problem, tiles)
        total += -(-made.blocks // problem.sms) * made.iterations * width * depth * (rows + DEQUANTIZING)
    return total / len(problem.row_tiles(config))


def candidates(base: dict[str, Any], problem: Problem) -> list[dict[str, Any]]:
    """Configurations near the package's choice that keep the order: itself if it does, then those with the least load,
    and of those the ones with more blocks, which wait for memory side by side."""
    found = [base] if keeps_order(base, problem) else []
    others: list[dict[str, Any]] = []
    for tile in _tiles(base, problem):
        for ctas in {1, tile.get("num_ctas_per_sm", 1)}:
            changed = {**tile, "num_ctas_per_sm": ctas}
            for config in (_largest_grid(changed, problem), {**changed, "use_stream_k": False}):
                if config is not None and config not in found + others:
                    others.append(config)
    return found + sorted(others, key=lambda config: (load(config, problem), -_blocks(config, problem)))


def _blocks(config: dict[str, Any], problem: Problem) -> int:
    return schedule(config, problem, problem.row_tiles(config)[-1]).blocks


def _tiles(base: dict[str, Any], problem: Problem) -> Iterator[dict[str, Any]]:
    """The choice itself, and smaller tiles: more of them fill the device without being cut often."""
    plain = {key: value for key, value in base.items() if key != "num_sms"}
    if plain.get("use_tma"):
        plain["use_tma_c"] = False
    yield plain
    rows, width, depth = base["block_shape"]
    warp_rows, warp_width, warp_depth = base["warp_shape"]
    if base.get("mma_type") == "mma":
        if width > 64 and warp_width <= 64:
            yield {**plain, "block_shape": (rows, 64, depth)}
        return
    for height, columns in ((rows, width // 2), (rows // 2, width), (rows // 2, width // 2), (128, width)):
        whole = height % 8 == 0 and 0 < height <= 256 and columns >= 4 * warp_width and rows == warp_rows
        if whole and problem.outputs % (columns * base.get("multi_cast_size_a", 1)) == 0:
            shape = {"block_shape": (height, columns, depth), "warp_shape": (height, warp_width, warp_depth)}
            yield {**plain, **shape}
    if problem.most <= 64 and problem.inputs % 128 == 0 and problem.outputs % 64 == 0:
        height = -(-problem.most // 16) * 16
        yield {
            "mma_type": "mma", "block_shape": (height, 64, 128), "warp_shape": (height, 32, 64), "num_stages": 4,
            "num_ctas_per_sm": 2, "use_stream_k": True, "use_tma": False, "use_warp_spec": False,
        }  # fmt: skip


def _largest_grid(config: dict[str, Any], problem: Problem) -> dict[str, Any] | None:
    """As many multiprocessors as keep the order: with fewer, runs are longer and tiles are cut less often."""
    for sms in range(problem.sms, problem.sms // 3, -1):
        tried = config if sms == problem.sms else {**config, "num_sms": sms}
        if keeps_order(tried, problem):
            return tried
    return None
