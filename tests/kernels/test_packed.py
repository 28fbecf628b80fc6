"""Linears of a CPU that leave weights packed, against the specification."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inlaid.config import ConfigError, EngineConfig
from inlaid.kernels import library, packed, spec
from inlaid.kernels.cpu import DenseLinear, DensePacked
from inlaid.kernels.packed import MANY_ROWS, CodesPacked, HalfLinear, PackedLinear
from inlaid.worker.loading import choose_kernels
from tests.kernels.test_linear_triton import random_linear

if library.c_compiler() is None:
    pytest.skip("no C compiler here: apt install gcc", allow_module_level=True)

CPU = torch.device("cpu")


def check(linear: PackedLinear, weight, rows: int) -> None:
    packed = linear.prepare(weight, CPU, torch.float32)
    assert isinstance(packed, CodesPacked)
    x = torch.randn(rows, weight.in_features)
    out = torch.full((rows, weight.out_features), torch.nan)
    linear.gemm(x, packed, out)
    expected = spec.quantized_linear(x, weight)
    error = (out - expected).norm() / expected.norm()
    assert error < 1e-5, f"relative error {error:.2e}"


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "act_order"),
    list(product([2, 3, 4, 8], [32, 64, 128, -1], [True, False], [True, False])),
)
def test_all_formats(bits: int, group: int, symmetric: bool, act_order: bool) -> None:
    """Each once in rows of four and one, and once in rows of which a part is dequantized at a time."""
    weight = random_linear(256, 96, bits, group, symmetric, act_order)
    for rows in (5, MANY_ROWS):
        check(PackedLinear(), weight, rows)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 7, MANY_ROWS - 1, MANY_ROWS, 70])
@pytest.mark.parametrize("columns", [8, 24, 96, 168])
def test_rows_and_widths_that_tiles_do_not_divide(rows: int, columns: int) -> None:
    check(PackedLinear(), random_linear(192, columns, 4, 64, False, False), rows)


def test_the_same_bits_on_any_number_of_threads() -> None:
    weight, x = random_linear(512, 640, 4, 128, True, False), torch.randn(3, 512)
    linear, before = PackedLinear(), torch.get_num_threads()
    packed = linear.prepare(weight, CPU, torch.float32)
    made = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(torch.empty(3, 640))
            linear.gemm(x, packed, made[-1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    linear, weight = PackedLinear(), random_linear(128, 64, 4, 64, True, False)
    packed = linear.prepare(weight, CPU, torch.float32)
    x = torch.randn(5, 128)
    clean, out = torch.empty(5, 64), torch.empty(5, 64)
    linear.gemm(x, packed, clean)
    x[2, 7] = torch.nan
    linear.gemm(x, packed, out)
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_groups_that_no_tile_reads_are_dequantized() -> None:
    linear, weight = PackedLinear(), random_linear(96, 32, 4, 4, True, False)
    packed = linear.prepare(weight, CPU, torch.float32)
    assert isinstance(packed, DensePacked)
    x, out = torch.randn(2, 96), torch.empty(2, 32)
    linear.gemm(x, packed, out)
    assert torch.allclose(out, spec.quantized_linear(x, weight), atol=1e-4)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_a_head_is_read_as_it_is_stored(stored: torch.dtype, rows: int) -> None:
    weight_NK, x = torch.randn(100, 64).to(stored), torch.randn(rows, 64)
    linear, out = HalfLinear(), torch.full((rows, 100), torch.nan)
    linear.gemm(x, linear.pack(weight_NK), out)
    whole, expected = DenseLinear(), torch.empty(rows, 100)
    whole.gemm(x, whole.pack(weight_NK.float()), expected)
    assert torch.allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("compiler", "cache", "words"),
    [
        ("cc", "file", "could not be built into .*Not a directory.*set XDG_CACHE_HOME"),
        ("nosuchcompiler", "new", "no C compiler was found"),
        ("false", "new", "false could not build packed.c"),
        ("true", "new", "could not be built into .*No such file"),  # it says that all is well, and makes nothing
    ],
)
def test_a_library_that_cannot_be_built_is_told(
    compiler: str, cache: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(library.BuildError, match=words):
        library.build_for_cpu(packed.SOURCE)


def test_a_library_that_is_damaged_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "damaged.so").write_text("no library")
    monkeypatch.setattr(library, "build_for_cpu", lambda source: tmp_path / "damaged.so")
    packed.load.cache_clear()
    try:
        with pytest.raises(library.BuildError, match="remove it, and it is built again"):
            packed.load()
    finally:
        packed.load.cache_clear()


def test_without_a_compiler_weights_are_dequantized_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "c_compiler", lambda: None)
    packed.load.cache_clear()
    model: Any = SimpleNamespace(quantized=True, dtype="float32")
    pages: Any = SimpleNamespace(pool=torch.empty(0), table=torch.empty(0))
    try:
        (chosen,) = choose_kernels(EngineConfig(), CPU, pages, model).quantized
        assert chosen.name == "reference"
        assert "apt install gcc" in caplog.text
        with pytest.raises(ConfigError, match="apt install gcc"):
            choose_kernels(EngineConfig(linear_backend="packed"), CPU, pages, model)
        with pytest.raises(ConfigError, match="computes in float32"):
            choose_kernels(EngineConfig(linear_backend="packed", dtype="bfloat16"), CPU, pages, model)
    finally:
        packed.load.cache_clear()
