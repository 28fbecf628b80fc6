"""What humming's scheduler makes of a launch, against the scheduler itself, put down here as every block runs it; the
headers whose kernels add in a fixed order, or leave parts."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from inlaid.kernels import humming_order
from inlaid.kernels.humming_order import EDITS, MOST_SLICES, Problem, candidates, headers, schedule, slices_of

SHAPES = ((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096), (14336, 4096), (1024, 512), (1088, 512))


@dataclass(frozen=True)
class Slice:
    """What one block does of one output tile."""

    m_block: int
    n_block: int
    first: int  # K tiles [first, first + iters)
    iters: int
    id: int
    count: int


def walk(config: dict[str, Any], problem: Problem, shape_m: int) -> dict[int, list[Slice]]:
    """Block -> what it does: scheduler.cuh of 0.1.19, its constructor, get_next_block and get_streamk_next_block for
    dense products on SM90, word by word, as every block runs it."""
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


@settings(max_examples=150, deadline=None)
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
    texts: dict[str, str] = defaultdict(lambda: "a();\n")
    for name, before, _, times in EDITS:
        texts[name] += f"{before}\n" * times
    for name, text in texts.items():
        file = root / "include" / "humming" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text if pipeline is None or "pipeline" not in name else pipeline)
        os.utime(file, ns=(1_000_000_007, 1_000_000_009))
    (root / "include" / "humming" / "other.cuh").write_text("b();")
    return root / "include"


def test_no_sum_is_added_as_it_arrives(tmp_path: Path) -> None:
    installed = package(tmp_path / "humming")
    before = {file: file.read_text() for file in installed.rglob("*.cuh")}
    made = headers(installed, tmp_path / "cache")
    for name, _, after, times in EDITS:
        text = (made / "humming" / name).read_text()
        assert "slice_count > 3" not in text
        assert text.count(after) == times
        assert (made / "humming" / name).stat().st_mtime_ns == 1_000_000_009  # part of a compiled kernel's name
    assert (made / "humming" / "other.cuh").read_text() == "b();"
    assert {file: file.read_text() for file in installed.rglob("*.cuh")} == before
    assert headers(installed, tmp_path / "cache") == made
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_headers_of_another_version_are_made_anew_or_refused(tmp_path: Path) -> None:
    made = headers(package(tmp_path / "humming"), tmp_path / "cache")
    found = "".join(before * times for name, before, _, times in EDITS if "pipeline" in name)
    other = package(tmp_path / "humming", f"c(); {found}")
    assert headers(other, tmp_path / "cache") != made
    for missing in (before for name, before, _, _ in EDITS if "pipeline" in name):
        with pytest.raises(ValueError, match=r"0\.1\.19.*--no-deterministic"):
            headers(package(tmp_path / "humming", "if (later) {}" + found.replace(missing, "")), tmp_path / "cache")
    assert len(list(made.parent.iterdir())) == 2


def test_headers_that_were_edited_otherwise_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = package(tmp_path / "humming")
    made = headers(installed, tmp_path / "cache")
    (name, before, after, times), *rest = EDITS
    monkeypatch.setattr(humming_order, "EDITS", ((name, before, after + " // another way", times), *rest))
    again = headers(installed, tmp_path / "cache")
    assert again != made
    assert "another way" in (again / "humming" / name).read_text()


def source_of(monkeypatch: pytest.MonkeyPatch, **tuning: Any) -> str:
    """The package's source of a kernel, written without a device."""
    if "cuda" not in sys.modules and importlib.util.find_spec("cuda") is None:
        for name in ("cuda", "cuda.bindings", "cuda.bindings.driver"):
            monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.setenv("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    dtypes, device = importlib.import_module("humming.dtypes"), importlib.import_module("humming.device")
    kernel = importlib.import_module("humming.kernel.humming")
    chip = SimpleNamespace(index=0, is_ppu=False, sm_version=90, max_registers_per_sm=65536, sm_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device.DeviceInfo, "_get_value", lambda self: chip)
    monkeypatch.setattr(kernel, "_cuda_compiler_version", lambda compiler: (13, 0))
    monkeypatch.setattr(kernel.KernelRuntime, "_instances", {})
    for name in ("prepare", "register_kernel"):
        monkeypatch.setattr(kernel.HummingKernel, name, lambda self: None)
    half = dtypes.float16
    made = kernel.HummingKernel(
        shape_n=4096, shape_k=4096, a_dtype=half, b_dtype=dtypes.uint4, c_dtype=half, bs_dtype=half,
        weight_scale_group_size=128, sm_version=90, **tuning,
    )  # fmt: skip
    return f"{made.code}\nauto kept = reinterpret_cast<void*>(&{made.kernel_expr});\n"


@pytest.mark.skipif(
    shutil.which("nvcc") is None or importlib.util.find_spec("humming") is None, reason="needs nvcc and humming"
)
def test_a_kernel_is_made_from_the_edited_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that can leave parts is not one in order; one that stores by TMA is."""
    spec = importlib.util.find_spec("humming")
    assert spec is not None
    installed = Path(spec.origin or "").parent / "include"
    both = headers(installed, tmp_path / "both")
    monkeypatch.setattr(humming_order, "EDITS", EDITS[:2])
    in_order = headers(installed, tmp_path / "in_order")
    tuning = {
        "mma_type": "wgmma", "block_shape": (64, 128, 64), "warp_shape": (64, 32, 64), "num_stages": 4,
        "num_ctas_per_sm": 2, "use_stream_k": True, "use_tma": True, "use_warp_spec": True,
    }  # fmt: skip
    flags = ["-std=c++17", "-DHUMMING_DEBUG_KERNEL=0", "--diag-suppress=39,161,174,177,940,1444"]
    flags += ["-gencode=arch=compute_90a,code=sm_90a", "-ptx", "--expt-relaxed-constexpr"]
    source, target = tmp_path / "kernel.cu", tmp_path / "kernel.ptx"
    for by_tma in (False, True):
        source.write_text(source_of(monkeypatch, use_tma_c=by_tma, **tuning))
        code = []
        for include in (both, in_order):
            made = subprocess.run(
                ["nvcc", source, "-o", target, f"-I{include}", *flags], capture_output=True, text=True, check=False
            )
            assert made.returncode == 0, made.stderr[-2000:]
            code.append(target.read_text())
        assert (code[0] == code[1]) == by_tma
