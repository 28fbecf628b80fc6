"""The division of a launch, against humming's scheduler itself, put down here as every block runs it."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from inlaid.kernels.humming_schedule import MOST_SLICES, Problem, schedule, slices_of
from tests.examples import examples

SHAPES = ((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096), (14336, 4096), (1024, 512), (1088, 512))


@dataclass(frozen=True)
class Slice:
    """The part of one output tile that one block computes."""

    m_block: int
    n_block: int
    first: int  # K tiles [first, first + iters)
    iters: int
    id: int
    count: int


def walk(config: dict[str, Any], problem: Problem, shape_m: int) -> dict[int, list[Slice]]:
    """Return the slices of each block.

    This is scheduler.cuh of 0.1.19 word by word, as every block runs it: its constructor, get_next_block and
    get_streamk_next_block, for dense products on SM90."""
    block_m, block_n, block_k = config["block_shape"]
    dim_n, dim_m = config.get("multi_cast_size_a", 1), config.get("multi_cast_size_b", 1)
    group_size = dim_n * dim_m
    num_ctas = config["num_ctas_per_sm"] * (config.get("num_sms") or problem.sms)
    grid = num_ctas // group_size * group_size
    n_blocks, k_blocks = problem.outputs // block_n // dim_n, problem.inputs // block_k
    alignment = max(1, problem.group // block_k)
    streamk_blocks = ceil_div(k_blocks, alignment) * alignment
    m_blocks = ceil_div(shape_m, block_m * dim_m)
    mn_blocks = m_blocks * n_blocks
    mnk_blocks = mn_blocks * streamk_blocks
    num_groups = grid // group_size
    raster = config.get("raster_group_m", 1)

    def map_mn_block(mn_index: int) -> tuple[int, int]:
        if raster <= 1:
            return mn_index // n_blocks, mn_index % n_blocks
        blocks_per_group = raster * n_blocks
        group_id = mn_index // blocks_per_group
        first_m = group_id * raster
        group_m = min(m_blocks - first_m, raster)
        index_in_group = mn_index - group_id * blocks_per_group
        return first_m + index_in_group % group_m, index_in_group // group_m

    def placed(mn_index: int, rank: int) -> tuple[int, int]:
        m, n = map_mn_block(mn_index)
        if dim_m > 1:
            m = m * dim_m + rank
        elif dim_n > 1:
            n = n * dim_n + rank
        return m, n

    done: dict[int, list[Slice]] = {}
    for block in range(grid):
        done[block] = []
        rank = block % group_size
        if config.get("use_stream_k", True):
            streamk_mn_blocks = mn_blocks
            if mn_blocks > num_groups:
                streamk_mn_blocks = mn_blocks % num_groups
                should_merge_previous_wave = streamk_mn_blocks * 10 <= num_groups
                if streamk_mn_blocks and should_merge_previous_wave:
                    streamk_mn_blocks += num_groups
            dp_mn_iters = (mn_blocks - streamk_mn_blocks) // num_groups
            total_iters = ceil_div(streamk_mn_blocks * streamk_blocks, num_groups)
            total_iters = max(total_iters, ceil_div(streamk_blocks - 1, 10 - 1))
            align_iters = alignment // math.gcd(alignment, config["num_stages"]) * config["num_stages"]
            if align_iters > 1:
                total_iters = align_iters * ceil_div(total_iters, align_iters)
            next_index = num_groups * dp_mn_iters * streamk_blocks + total_iters * (block // group_size)
            iters = 0 if next_index >= mnk_blocks else min(mnk_blocks - next_index, total_iters)
            dp_next = block // group_size
            for _ in range(dp_mn_iters):
                done[block].append(Slice(*placed(dp_next, rank), 0, k_blocks, 0, 1))
                dp_next += grid // group_size
            while iters:
                mn_index = next_index // streamk_blocks
                k_block = next_index - mn_index * streamk_blocks
                scheduled = min(streamk_blocks - k_block, iters)
                slice_iters = min(k_blocks - k_block, scheduled)
                iters -= scheduled
                next_index += scheduled
                if k_block == 0:
                    slice_id = 0
                    slice_count = ceil_div(streamk_blocks - scheduled, total_iters) + 1
                else:
                    slice_id = k_block // total_iters
                    first_block_iters = k_block - slice_id * total_iters
                    slice_count = ceil_div(streamk_blocks - first_block_iters, total_iters)
                    if first_block_iters:
                        slice_id += 1
                        slice_count += 1
                slice_id = slice_count - 1 - slice_id
                done[block].append(Slice(*placed(mn_index, rank), k_block, slice_iters, slice_id, slice_count))
        else:
            dp_next = block // group_size
            while dp_next < mn_blocks:
                done[block].append(Slice(*placed(dp_next, rank), 0, k_blocks, 0, 1))
                dp_next += grid // group_size
    return done


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


configs = st.fixed_dictionaries(
    {
        "block_shape": st.tuples(
            st.sampled_from([8, 16, 64, 176]), st.sampled_from([64, 128, 256]), st.sampled_from([64, 128, 256])
        ),
        "num_ctas_per_sm": st.sampled_from([1, 2, 3, 4]),
        "num_stages": st.sampled_from([2, 3, 4, 5]),
    },
    optional={
        "multi_cast_size_a": st.just(2),
        "num_sms": st.integers(40, 132),
        "raster_group_m": st.integers(1, 4),
        "use_stream_k": st.booleans(),
    },
) | st.just(
    {"block_shape": (64, 128, 64), "num_ctas_per_sm": 1, "num_stages": 4, "multi_cast_size_b": 2, "raster_group_m": 2}
)


@examples(150)
@given(configs, st.sampled_from(SHAPES), st.integers(1, 700))
def test_slices_are_those_of_the_scheduler(config: dict[str, Any], shape: tuple[int, int], rows: int) -> None:
    problem = Problem(*shape, 128, 0, rows, 132)
    _, width, depth = config["block_shape"]
    assume(shape[1] % (width * config.get("multi_cast_size_a", 1)) == 0 and shape[0] % depth == 0)
    row_tiles = problem.row_tiles(config)
    made, counts = schedule(config, problem, row_tiles), slices_of(config, problem, row_tiles)
    done = walk(config, problem, rows)
    tiles: dict[tuple[int, int], list[Slice]] = defaultdict(list)
    for slices in done.values():
        for one in slices:
            tiles[one.m_block, one.n_block].append(one)
    across = config.get("multi_cast_size_b", 1)
    assert len(tiles) == len(counts) * across * len(counts[0]) == row_tiles * across * (shape[1] // width)
    for (m, n), slices in tiles.items():
        assert {one.count for one in slices} == {counts[m // across][n]}
        assert sorted(one.id for one in slices) == list(range(counts[m // across][n]))
        at = 0
        for one in sorted(slices, key=lambda one: -one.id):  # the last is the first of K
            assert one.first == at
            at += one.iters
            assert one.iters > 0
        assert at == shape[0] // depth
    assert made.slices == max(map(max, counts)) <= MOST_SLICES
    assert made.blocks >= sum(map(bool, done.values()))
