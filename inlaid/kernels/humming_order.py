"""humming's kernels with their sums in a fixed order.

Its stream-K gives every block a run of K tiles, so that an output tile may be summed by several blocks ("slices"). Two
slices are always added in the same order, and so are three without TMA stores; of more, those after the first are added
as they arrive, in half precision, and then the same batch need not give the same bits twice. The package has the other
way too, each slice waiting for the one before it, for devices that cannot add half precision atomically. `headers` is a
copy of its headers in which every kernel takes that way, made from the installed package at first use and kept with its
compiled kernels. One thing is added: a launch with top_k = IN_PARTS (products of one matrix have no use for it) lets
every slice write memory of its own, as if it were a whole tile, and nobody waits. `slices_of` says how many there are
of each tile; the kernel that reads the product next adds them.

A slice that waits costs time, so fewer slices, or smaller tiles, may be faster than the package's own choice of
parameters: `candidates` are those that a sweep times (perf/gpu/humming_sweep.py), with what the scheduler makes of them
(`schedule`). Shapes: K inputs, N outputs; a configuration is the package's dict of parameters.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_SLICES = 10  # the package bounds them so
LAST_ROWS = 8192  # of the bucket without an end
CUTS = (4, 2)  # slices that a candidate is held to
IN_PARTS = 2
STATE = "    locks_offset = locks_offset_;\n"  # where a slice is told which one it is, after where its tile lies
ARRIVING = "(GmemWriter::kHasNativeAtomicAdd && slice_count > 3)"
BY_ITSELF = f"""    if constexpr (Ctx::kIsDenseGemm && !Ctx::kUseTmaC) {{
      if (ctx.params.top_k == {IN_PARTS}) {{
        gmem_writer.gmem_ptr += slice_id_ * ctx.params.shape_m * ((Ctx::ProblemShape::N - Ctx::PadShape::N) / 8);
        slice_count = 1;
        slice_id = 0;
      }}
    }}
"""
EDITS: tuple[tuple[str, str, str, int], ...] = (  # (file, text, what it becomes, how often it is there)
    ("epilogue/pipeline.cuh", f"if (Ctx::kUseTmaC || {ARRIVING})", "if (false)", 2),
    ("epilogue/gmem_writer.cuh", "else if (kHasNativeAtomicAdd && slice_count > 3)", "else if (false)", 1),
    ("epilogue/pipeline.cuh", STATE, STATE + BY_ITSELF, 1),
)  # fmt: skip


def headers(installed: Path, cache: Path) -> Path:
    """An include folder like the installed one, whose kernels add in a fixed order. Times of files are kept: they are
    part of the names of compiled kernels."""
    made = cache / "ordered-headers" / _stamp(installed)
    if made.is_dir():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=made.parent))
    try:
        shutil.copytree(installed, scratch / "include")
        for name, before, after, times in EDITS:
            _edit(scratch / "include" / "humming" / name, before, after, times)
        try:
            os.rename(scratch / "include", made)
        except OSError:  # another process was first
            if not made.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return made


def _stamp(installed: Path) -> str:
    """Changes when a file that is edited changes, or how it is edited."""
    status = [(installed / "humming" / name).stat() for name in dict.fromkeys(name for name, *_ in EDITS)]
    edits = hashlib.sha256(repr(EDITS).encode()).hexdigest()[:8]
    return "-".join([*(f"{one.st_size:x}.{one.st_mtime_ns:x}" for one in status), edits])


def _edit(file: Path, before: str, after: str, times: int) -> None:
    status, text = file.stat(), file.read_text()
    if text.count(before) != times:
        raise ValueError(
            "this version of humming-kernels adds its sums in another way than 0.1.19: install that version, "
            "or pass --no-deterministic"
        )
    file.write_text(text.replace(before, after))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@dataclass(frozen=True)
class Problem:
    """A bucket of rows (above `below`, up to `most`) of a linear layer on a device of `sms` multiprocessors."""

    inputs: int
    outputs: int
    group: int
    below: int
    most: int
    sms: int

    def row_tiles(self, config: dict[str, Any]) -> int:
        """The most tiles of rows."""
        height = config["block_shape"][0] * config.get("multi_cast_size_b", 1)
        return -(-min(self.most, LAST_ROWS) // height)


@dataclass(frozen=True)
class Schedule:
    """What the scheduler makes of a launch."""

    slices: int  # the most that one output tile is cut into
    iterations: int  # K tiles of the busiest block
    blocks: int  # blocks with work


@dataclass(frozen=True)
class _Cut:
    """Output tiles in whole waves go to blocks whole; the last `cut` tiles are cut into equal runs of K tiles."""

    tiles: int  # of as many columns as blocks side by side share
    k_tiles: int
    cut: int
    run: int
    groups: int  # of blocks that share
    together: int  # blocks of a group side by side
    cluster: int  # blocks of a group

    @property
    def slices(self) -> list[int]:
        """Of each tile, in the order of the scheduler."""
        firsts = range(0, self.cut * self.k_tiles, self.k_tiles)
        return [1] * (self.tiles - self.cut) + [
            (first + self.k_tiles - 1) // self.run - first // self.run + 1 for first in firsts
        ]


def _cut(config: dict[str, Any], problem: Problem, row_tiles: int) -> _Cut:
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


def schedule(config: dict[str, Any], problem: Problem, row_tiles: int) -> Schedule:
    made = _cut(config, problem, row_tiles)
    if not config.get("use_stream_k", True):
        waves = -(-made.tiles // made.groups)
        return Schedule(1, waves * made.k_tiles, min(made.tiles, made.groups) * made.cluster)
    whole, cut = (made.tiles - made.cut) // made.groups, made.cut * made.k_tiles
    blocks = made.groups if whole else -(-cut // made.run)
    return Schedule(max(made.slices), whole * made.k_tiles + min(made.run, cut), blocks * made.cluster)


def slices_of(config: dict[str, Any], problem: Problem, row_tiles: int) -> list[list[int]]:
    """How many parts each tile has: by its rows, then its columns. With `multi_cast_size_b` a tile has the rows of
    that many blocks."""
    made = _cut(config, problem, row_tiles)
    across, together = made.tiles // row_tiles, config.get("raster_group_m", 1)
    found = [[0] * (across * made.together) for _ in range(row_tiles)]
    for index, count in enumerate(made.slices):
        if together <= 1:
            row, column = divmod(index, across)
        else:  # this many rows of tiles are gone through column by column
            first = index // (together * across) * together
            column, row = divmod(index - first * across, min(row_tiles - first, together))
            row += first
        for beside in range(made.together):
            found[row][column * made.together + beside] = count
    return found


def candidates(base: dict[str, Any], problem: Problem) -> list[dict[str, Any]]:
    """The package's choice and others near it: fewer blocks on a multiprocessor, fewer slices, none, smaller tiles."""
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


def _smaller(base: dict[str, Any], problem: Problem) -> Iterator[dict[str, Any]]:
    """More tiles fill the device without being cut often."""
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


def _held(config: dict[str, Any], problem: Problem, slices: int) -> dict[str, Any] | None:
    """On as many multiprocessors as cut no tile further: with fewer, runs are longer."""
    for sms in range(problem.sms, problem.sms // 3, -1):
        tried = config if sms == problem.sms else {**config, "num_sms": sms}
        if schedule(tried, problem, problem.row_tiles(tried)).slices <= slices:
            return tried
    return None
