"""Whether humming's sums keep their order, against a walk through every block's share of the work."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from inlaid.kernels.humming_order import Problem, candidates, keeps_order, load, schedule

SHAPES = ((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096), (14336, 4096), (1024, 512))


def walk(config: dict[str, Any], problem: Problem, row_tiles: int) -> dict[int, list[int]]:
    """Output tile -> the blocks that sum it, in the order of the part of K that each of them takes: block by block, as
    they fetch their work, without a formula for the number of slices."""
    _, width, depth = config["block_shape"]
    together = config.get("multi_cast_size_a", 1)
    groups = (config.get("num_sms") or problem.sms) * config["num_ctas_per_sm"] // together
    tiles = row_tiles * (problem.outputs // width // together)
    k_tiles = problem.inputs // depth
    k_tiles += -k_tiles % max(1, problem.group // depth)
    parts: dict[int, list[int]] = defaultdict(list)
    cut = tiles if tiles <= groups else tiles % groups
    if tiles > groups and 0 < cut * 10 <= groups:
        cut += groups
    for tile in range(tiles - cut):
        parts[tile].append(tile % groups)
    stages = config["num_stages"]
    unit = stages  # runs are whole rounds of the stages, and whole scale groups
    while unit % max(1, problem.group // depth):
        unit += stages
    run = max(-(-cut * k_tiles // groups), -(-(k_tiles - 1) // 9))
    run += -run % unit
    for block in range(groups):
        for step in range(block * run, min((block + 1) * run, cut * k_tiles)):
            tile = tiles - cut + step // k_tiles
            if not parts[tile] or parts[tile][-1] != block:
                parts[tile].append(block)
    return parts


configs = st.fixed_dictionaries(
    {
        "block_shape": st.tuples(
            st.sampled_from([8, 16, 64, 176]), st.sampled_from([64, 128, 256]), st.sampled_from([64, 128, 256])
        ),
        "num_ctas_per_sm": st.sampled_from([1, 2, 3]),
        "num_stages": st.sampled_from([3, 4, 5]),
        "multi_cast_size_a": st.sampled_from([1, 2]),
        "use_tma": st.booleans(),
    },
    optional={"num_sms": st.integers(40, 132), "use_tma_c": st.just(False)},
)


@settings(max_examples=80, deadline=None)
@given(configs, st.sampled_from(SHAPES), st.integers(1, 5))
def test_slices_are_those_of_the_walk(config: dict[str, Any], shape: tuple[int, int], row_tiles: int) -> None:
    problem = Problem(*shape, 128, 0, 64, 132)
    assume(shape[1] % (config["block_shape"][1] * config["multi_cast_size_a"]) == 0)
    made, walked = schedule(config, problem, row_tiles), walk(config, problem, row_tiles)
    assert made.slices == max(len(blocks) for blocks in walked.values())
    busy = {block for blocks in walked.values() for block in blocks}
    assert made.blocks >= len(busy) * config["multi_cast_size_a"]


def test_only_few_slices_keep_the_order() -> None:
    """4096 x 4096 at 64 rows: 32 output tiles of 64 K tiles each, in runs of 8, are eight slices."""
    config = {"block_shape": (64, 128, 64), "num_ctas_per_sm": 2, "num_stages": 4, "use_tma": True}
    problem = Problem(4096, 4096, 128, 48, 64, 132)
    assert schedule(config, problem, 1).slices == 8
    assert not keeps_order(config, problem)
    assert keeps_order({**config, "use_stream_k": False}, problem)
    three = {**config, "num_ctas_per_sm": 1, "num_sms": 57}  # runs of 36
    assert schedule(three, problem, 1).slices == 3
    assert not keeps_order(three, problem)  # TMA adds the second and the third as they come
    assert keeps_order({**three, "use_tma_c": False}, problem)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from([(0, 1), (8, 16), (16, 24), (48, 64), (96, 128), (192, 256), (256, 512)]),
    st.booleans(),
)
def test_every_candidate_keeps_the_order(shape: tuple[int, int], rows: tuple[int, int], tall: bool) -> None:
    height = min(rows[1], 176) if rows[1] > 32 else -(-rows[1] // 8) * 8
    base: dict[str, Any] = {"num_stages": 4, "num_ctas_per_sm": 2, "use_stream_k": True}
    if rows[1] <= 32:
        base |= {"mma_type": "mma", "block_shape": (height, 128, 128), "warp_shape": (height, 64, 32)}
    else:
        width = 256 if tall else 128
        base |= {"mma_type": "wgmma", "use_tma": True, "use_warp_spec": True}
        base |= {"block_shape": (height, width, 64), "warp_shape": (height, 32, 64)}
    problem = Problem(*shape, 128, *rows, 132)
    found = candidates(base, problem)
    assert found
    for config in found:
        for row_tiles in problem.row_tiles(config):
            most = max(len(blocks) for blocks in walk(config, problem, row_tiles).values())
            most = most if config["use_stream_k"] else 1
            assert most <= (2 if config.get("use_tma_c", config.get("use_tma", False)) else 3)
    loads = [load(config, problem) for config in found if config != base]
    assert loads == sorted(loads)
