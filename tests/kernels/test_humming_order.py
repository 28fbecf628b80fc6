"""What humming's scheduler makes of a launch, against a walk through every block's share of the work; the headers whose
kernels add in a fixed order."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from inlaid.kernels.humming_order import EDITS, Problem, candidates, headers, schedule

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


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from([(0, 1), (8, 16), (16, 24), (48, 64), (96, 128), (192, 256), (256, 512)]),
    st.booleans(),
)
def test_candidates_have_fewer_slices_or_more_tiles(shape: tuple[int, int], rows: tuple[int, int], tall: bool) -> None:
    height = min(rows[1], 176) if rows[1] > 32 else -(-rows[1] // 8) * 8
    base: dict[str, Any] = {"num_stages": 4, "num_ctas_per_sm": 2, "use_stream_k": True}
    if rows[1] <= 32:
        base |= {"mma_type": "mma", "block_shape": (height, 128, 128), "warp_shape": (height, 64, 32)}
    else:
        width = 256 if tall else 128
        base |= {"mma_type": "wgmma", "use_tma": True, "use_warp_spec": True}
        base |= {"block_shape": (height, width, 64), "warp_shape": (height, 32, 64)}
    problem = Problem(*shape, 128, *rows, 132)
    first, *others = candidates(base, problem)
    assert first == base
    assert all(one not in others[:index] for index, one in enumerate(others))
    most = schedule(base, problem, problem.row_tiles(base)).slices
    for config in others:
        smaller = config["block_shape"] != base["block_shape"]
        made = schedule(config, problem, problem.row_tiles(config))
        assert smaller or made.slices <= most or config["num_ctas_per_sm"] == 1
        assert 1 <= made.blocks <= problem.sms * config["num_ctas_per_sm"]


def package(root: Path, pipeline: str | None = None) -> Path:
    """Headers like the package's: what is edited, and a file beside it."""
    for name, (condition, times) in EDITS.items():
        file = root / "include" / "humming" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "a();\n" + f"{condition} {{ arrive(); }} else {{ wait(); }}\n" * times
        file.write_text(text if pipeline is None or "pipeline" not in name else pipeline)
        os.utime(file, ns=(1_000_000_007, 1_000_000_009))
    (root / "include" / "humming" / "other.cuh").write_text("b();")
    return root / "include"


def test_no_sum_is_added_as_it_arrives(tmp_path: Path) -> None:
    installed = package(tmp_path / "humming")
    before = {file: file.read_text() for file in installed.rglob("*.cuh")}
    made = headers(installed, tmp_path / "cache")
    for name in EDITS:
        text = (made / "humming" / name).read_text()
        assert "slice_count > 3" not in text
        assert text.count("if (false) { arrive(); } else { wait(); }") == EDITS[name][1]
        assert (made / "humming" / name).stat().st_mtime_ns == 1_000_000_009  # part of a compiled kernel's name
    assert (made / "humming" / "other.cuh").read_text() == "b();"
    assert {file: file.read_text() for file in installed.rglob("*.cuh")} == before
    assert headers(installed, tmp_path / "cache") == made
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_headers_of_another_version_are_made_anew_or_refused(tmp_path: Path) -> None:
    made = headers(package(tmp_path / "humming"), tmp_path / "cache")
    condition, times = EDITS["epilogue/pipeline.cuh"]
    other = package(tmp_path / "humming", f"c(); {condition}" * times)
    assert headers(other, tmp_path / "cache") != made
    with pytest.raises(ValueError, match=r"0\.1\.19.*--no-deterministic"):
        headers(package(tmp_path / "humming", "if (later) {}"), tmp_path / "cache")
    assert len(list(made.parent.iterdir())) == 2
