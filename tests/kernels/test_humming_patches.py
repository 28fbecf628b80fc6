"""The changes of humming-kernels: its version, and the headers whose kernels add in a fixed order or leave parts."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from inlaid.checkpoint import QuantSpec
from inlaid.kernels import humming_patches
from inlaid.kernels.auto import AutoLinear
from inlaid.kernels.cpu import ReferenceLinear
from inlaid.kernels.humming import HummingLinear
from inlaid.kernels.humming_patches import EDITS, PatchError, check_version, ordered_headers
from inlaid.kernels.measure import random_weight

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.mark.parametrize("version", ["0.1.18", "0.1.20", "1.0"])
def test_another_version_is_refused_and_no_backend_takes_over(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(PatchError, match=rf"humming-kernels {version} .*0\.1\.19.*--linear-backend triton"):
        check_version()
    monkeypatch.setattr(HummingLinear, "why_not", lambda self, spec, device: None)
    monkeypatch.setattr(humming_patches, "load", humming_patches.load.__wrapped__)  # as before the first load
    auto = AutoLinear([HummingLinear(), ReferenceLinear()], table=())
    weight = random_weight(64, 128, QuantSpec(4, 32, True, False), "cpu")
    with pytest.raises(PatchError):
        auto.prepare(weight, torch.device("cpu"), torch.float16)


def test_a_version_that_cannot_be_told_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(PatchError, match="unknown version"):
        check_version()


def test_the_version_is_the_one_that_is_installed_by_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f'"humming-kernels=={humming_patches.VERSION}"' in PROJECT.read_text()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: humming_patches.VERSION)
    check_version()


def test_the_environment_is_as_before_after_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package: the import fails, and leaves neither the switch nor torch.compile's mark behind."""
    monkeypatch.setattr(humming_patches, "check_version", lambda: None)
    monkeypatch.setitem(sys.modules, "humming", None)
    monkeypatch.delenv(humming_patches.SWITCH, raising=False)
    mark = torch.compiler.assume_constant_result
    with pytest.raises(ImportError):
        humming_patches.load.__wrapped__()
    assert humming_patches.SWITCH not in os.environ
    assert torch.compiler.assume_constant_result is mark


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
    made = ordered_headers(installed, tmp_path / "cache")
    for name, _, after, times in EDITS:
        text = (made / "humming" / name).read_text()
        assert "slice_count > 3" not in text
        assert text.count(after) == times
        assert (made / "humming" / name).stat().st_mtime_ns == 1_000_000_009  # part of a compiled kernel's name
    assert (made / "humming" / "other.cuh").read_text() == "b();"
    assert {file: file.read_text() for file in installed.rglob("*.cuh")} == before
    assert ordered_headers(installed, tmp_path / "cache") == made
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_headers_of_another_version_are_made_anew_or_refused(tmp_path: Path) -> None:
    made = ordered_headers(package(tmp_path / "humming"), tmp_path / "cache")
    found = "".join(before * times for name, before, _, times in EDITS if "pipeline" in name)
    other = package(tmp_path / "humming", f"c(); {found}")
    assert ordered_headers(other, tmp_path / "cache") != made
    for missing in (before for name, before, _, _ in EDITS if "pipeline" in name):
        with pytest.raises(PatchError, match=r"0\.1\.19.*--no-deterministic"):
            ordered_headers(
                package(tmp_path / "humming", "if (later) {}" + found.replace(missing, "")), tmp_path / "cache"
            )
    assert len(list(made.parent.iterdir())) == 2


def test_headers_that_were_edited_otherwise_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = package(tmp_path / "humming")
    made = ordered_headers(installed, tmp_path / "cache")
    (name, before, after, times), *rest = EDITS
    monkeypatch.setattr(humming_patches, "EDITS", ((name, before, after + " // another way", times), *rest))
    again = ordered_headers(installed, tmp_path / "cache")
    assert again != made
    assert "another way" in (again / "humming" / name).read_text()


def source_of(monkeypatch: pytest.MonkeyPatch, **tuning: Any) -> str:
    """Return the package's source of a kernel, written without a device."""
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
def test_a_kernel_is_made_from_the_edited_ordered_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that can leave parts is not one in order; one that stores by TMA is."""
    spec = importlib.util.find_spec("humming")
    assert spec is not None
    installed = Path(spec.origin or "").parent / "include"
    both = ordered_headers(installed, tmp_path / "both")
    monkeypatch.setattr(humming_patches, "EDITS", EDITS[:2])
    in_order = ordered_headers(installed, tmp_path / "in_order")
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
