"""The division of a product by humming's stream-K scheduler, computed on the host from a kernel's parameters.

Every block gets a run of K tiles, so that an output tile may be summed by several blocks. `slices_of` says by how many,
which whoever reads a product in parts must know (humming_patches.py, change 5); `schedule` gives the longest run, by
which a sweep judges parameters (perf/gpu/candidates.py). tests/kernels/test_humming_schedule.py holds both to the
scheduler itself, version 0.1.19.

A configuration is the package's dict of a kernel's parameters. Tiles are block_shape = (rows, outputs, inputs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_SLICES = 10  # the scheduler never cuts a tile further
LAST_ROWS = 8192  # rows assumed for a bucket without an end
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """A linear layer for row counts in (below, most] on a device of `sms` multiprocessors."""

    inputs: int
    outputs: int
    group: int
    below: int
    most: int
    sms: int

    def row_tiles(self, config: Config) -> int:
        """Return the number of row tiles at the most rows."""
        height: int = config["block_shape"][0] * config.get("multi_cast_size_b", 1)
        return -(-min(self.most, LAST_ROWS) // height)


@dataclass(frozen=True)
class Schedule:
    """The extremes of a launch."""

    slices: int  # of the output tile that is cut the most
    iterations: int  # K tiles of the busiest block
    blocks: int  # blocks with work


@dataclass(frozen=True)
class _Cut:
    """The division of a launch: tiles in whole waves go to one block each, the last `cut` tiles are cut into runs."""

    tiles: int  # output tiles, each as wide as the blocks of a group side by side
    k_tiles: int  # of an output tile
    cut: int  # output tiles that may be shared
    run: int  # K tiles of a block among the shared ones
    groups: int  # groups of blocks that share what they read
    together: int  # blocks of a group side by side
    cluster: int  # blocks of a group

    @property
    def slices(self) -> list[int]:
        """Return the number of slices of each tile, in the scheduler's order."""
        firsts = range(0, self.cut * self.k_tiles, self.k_tiles)
        return [1] * (self.tiles - self.cut) + [
            (first + self.k_tiles - 1) // self.run - first // self.run + 1 for first in firsts
        ]


def _cut(config: Config, problem: Problem, row_tiles: int) -> _Cut:
    """Return the division that the constructor of scheduler.cuh computes."""
    _, width, depth = config["block_shape"]
    together = config.get("multi_cast_size_a", 1)  # blocks side by side that share their rows
    cluster = together * config.get("multi_cast_size_b", 1)
    groups = (config.get("num_sms") or problem.sms) * config.get("num_ctas_per_sm", 1) // cluster
    tiles, k_tiles = row_tiles * (problem.outputs // width // together), problem.inputs // depth
    if not config.get("use_stream_k", True):
        return _Cut(tiles, k_tiles, 0, 1, groups, together, cluster)
    alignment = max(1, problem.group // depth)
    k_tiles = -(-k_tiles // alignment) * alignment
    cut = tiles
    if tiles > groups:
        cut = tiles % groups
        if cut and cut * 10 <= groups:
            cut += groups
    run = max(-(-cut * k_tiles // groups), -(-(k_tiles - 1) // (MOST_SLICES - 1)))
    step = alignment // math.gcd(alignment, config.get("num_stages", 2)) * config.get("num_stages", 2)
    return _Cut(tiles, k_tiles, cut, max(1, -(-run // step) * step), groups, together, cluster)


def schedule(config: Config, problem: Problem, row_tiles: int) -> Schedule:
    """Return the extremes of a launch over `row_tiles` tiles of rows."""
    made = _cut(config, problem, row_tiles)
    if not config.get("use_stream_k", True):
        waves = -(-made.tiles // made.groups)
        return Schedule(1, waves * made.k_tiles, min(made.tiles, made.groups) * made.cluster)
    whole, cut = (made.tiles - made.cut) // made.groups, made.cut * made.k_tiles
    blocks = made.groups if whole else -(-cut // made.run)
    return Schedule(max(made.slices), whole * made.k_tiles + min(made.run, cut), blocks * made.cluster)


def slices_of(config: Config, problem: Problem, row_tiles: int) -> list[list[int]]:
    """Return the number of slices of each tile, [row tile][column tile].

    With `multi_cast_size_b` a row tile has the rows of that many blocks."""
    made = _cut(config, problem, row_tiles)
    across, together = made.tiles // row_tiles, config.get("raster_group_m", 1)
    found = [[0] * (across * made.together) for _ in range(row_tiles)]
    for index, count in enumerate(made.slices):
        if together <= 1:
            row, column = divmod(index, across)
        else:  # `together` rows of tiles are walked column by column
            first = index // (together * across) * together
            column, row = divmod(index - first * across, min(row_tiles - first, together))
            row += first
        for beside in range(made.together):
            found[row][column * made.together + beside] = count
    return found
