"""The parameters of humming's kernels, with a stand-in for the package; and on a GPU that has it, its products: right
values and the same bits again, for numbers of rows in every kind of bucket."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inlaid.checkpoint import QuantSpec, dequantize
from inlaid.kernels import early, humming, humming_patches, spec
from inlaid.kernels.measure import random_weight

DEVICE = torch.device("cuda")
LAYER: Any = SimpleNamespace(
    shape_k=4096, shape_n=4096, weight_scale_group_size=128, b_dtype=SimpleNamespace(num_bits=4)
)
SMS = 132


def package(config: Any, shape_m: int, device: torch.device) -> dict[str, Any]:
    """Choose parameters as the package does: more slices than keep the order, at every number of rows."""
    if shape_m <= 32:
        height = -(-shape_m // 8) * 8
        return {"mma_type": "mma", "block_shape": (height, 128, 128), "warp_shape": (height, 64, 32), "num_stages": 4,
                "num_ctas_per_sm": 1, "use_stream_k": True, "use_tma": False}  # fmt: skip
    height = min(shape_m, 128)
    return {"mma_type": "wgmma", "block_shape": (height, 128, 64), "warp_shape": (height, 32, 64), "num_stages": 4,
            "num_ctas_per_sm": 2, "use_stream_k": True, "use_tma": True}  # fmt: skip


def compiled(kind: str, _: None, chosen: list[list[Any]], device: torch.device) -> torch.Tensor:
    """Return a table like the package's, with stand-ins for kernels."""
    rows = [[below, most, index, config.get("num_sms", 0)] for index, (below, most, config) in enumerate(chosen)]
    return torch.tensor(rows).flatten()


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make a device of 132 multiprocessors with an empty table of tuned parameters."""
    monkeypatch.setattr(humming_patches, "load", lambda: SimpleNamespace(heuristics=package, prepare=compiled))
    monkeypatch.setattr(humming, "TUNING", tmp_path / "tuning.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "chip")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    properties = SimpleNamespace(multi_processor_count=SMS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(early, "possible", lambda: False)
    return tmp_path / "tuning.json"


def tune(table: Path, **entry: Any) -> None:
    about = {"device": "chip", "bits": 4, "inputs": 4096, "outputs": 4096}
    old = json.loads(table.read_text())["entries"] if table.exists() else []
    table.write_text(json.dumps({"entries": [*old, {**about, **entry}]}))


def test_every_number_of_rows_is_served(chip: Path) -> None:
    chosen = humming.intervals(LAYER, DEVICE)
    assert [below for below, _, _ in chosen] == [0, *humming.ROW_BUCKETS[:-1]]
    assert [most for _, most, _ in chosen] == [*humming.ROW_BUCKETS[:-1], humming.OPEN]


def test_devices_of_another_generation_keep_the_packages_choice(chip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(chip, buckets=[64], ordered=True, parts=True, changes=WHOLE)
    backend = humming.HummingLinear()
    assert backend.parts(packed_for(backend), 64) is not None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    older = humming.HummingLinear()
    assert older.parts(packed_for(older), 64) is None
    for (_, _, config), rows in zip(humming.intervals(LAYER, DEVICE), humming.ROW_BUCKETS, strict=True):
        assert config == package(LAYER, rows, DEVICE)


def test_without_it_the_choice_is_the_packages(chip: Path) -> None:
    for (_, most, config), rows in zip(humming.intervals(LAYER, DEVICE, False), humming.ROW_BUCKETS, strict=True):
        assert config == package(LAYER, rows, DEVICE), most


def test_what_a_sweep_found_is_taken(chip: Path) -> None:
    halved = {"block_shape": [32, 128, 64], "num_ctas_per_sm": 1, "use_tma_c": False}
    tune(chip, buckets=[64], ordered=True, changes=halved)
    tune(chip, buckets=[64], ordered=True, device="other chip", changes={"num_stages": 5})
    tune(chip, buckets=[64], changes={"num_stages": 3})  # the fastest in any order
    tune(chip, buckets=[16], changes={"num_stages": 3})
    tune(chip, buckets=[16], ordered=True, changes={"num_ctas_per_sm": 2})
    found = {most: config for _, most, config in humming.intervals(LAYER, DEVICE)}
    assert found[64] == {**package(LAYER, 64, DEVICE), **halved}
    assert (found[16]["num_stages"], found[16]["num_ctas_per_sm"]) == (4, 2)
    by_arrival = {most: config for _, most, config in humming.intervals(LAYER, DEVICE, False)}
    assert by_arrival[64] == {**package(LAYER, 64, DEVICE), "num_stages": 3}


def test_what_was_found_on_another_device_is_better_than_nothing(chip: Path) -> None:
    halved = {"block_shape": [32, 128, 64], "num_ctas_per_sm": 1, "use_tma_c": False}
    tune(chip, buckets=[64], ordered=True, device="other chip", changes=halved)
    found = {most: config for _, most, config in humming.intervals(LAYER, DEVICE)}
    assert found[64] == {**package(LAYER, 64, DEVICE), **halved}


def test_early_launches_are_asked_of_every_kernel(chip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("use_pdl" in config for _, _, config in humming.intervals(LAYER, DEVICE))
    monkeypatch.setattr(early, "possible", lambda: True)
    assert all(config["use_pdl"] for _, _, config in humming.intervals(LAYER, DEVICE))


WHOLE = {"block_shape": [64, 128, 64], "num_ctas_per_sm": 2, "use_tma_c": False, "num_sms": 0}


WARPS = {"mma_type": "wgmma", "warp_shape": [64, 32, 64], "num_stages": 4, "use_tma": True, "use_warp_spec": True}


def packed_for(backend: humming.HummingLinear) -> humming.HummingPacked:
    backend._compile("kind", LAYER, DEVICE)
    weight = torch.empty(0)
    return humming.HummingPacked(weight, weight, None, None, "kind", 4096, 4096)


def test_parts_are_offered_where_they_were_found_faster(chip: Path) -> None:
    tune(chip, buckets=[48, 64], ordered=True, changes={**WHOLE, "num_stages": 3})
    tune(chip, buckets=[64, 256], ordered=True, parts=True, changes=WHOLE)
    tune(chip, buckets=[128], ordered=True, parts=True, device="other chip", changes=WHOLE)
    tune(chip, buckets=[128], ordered=True, changes=WHOLE)
    backend = humming.HummingLinear()
    packed = packed_for(backend)
    found = {rows: backend.parts(packed, rows) for rows in (1, 48, 49, 64, 65, 128, 200, 256, 257, 5000)}
    assert [rows for rows, parts in found.items() if parts is not None] == [49, 64, 200, 256]
    few, many = found[64], found[256]
    assert few is not None
    assert many is not None
    assert (few.height, few.width, few.counts.shape, few.counts.dtype) == (64, 128, (1, 32), torch.int32)
    assert few.most == int(few.counts.max()) == 8  # 32 tiles of 64 K tiles over 264 blocks, four at a time
    assert many.counts.shape == (4, 32)
    assert found[49] is few
    assert humming.tuned_for(LAYER, DEVICE, ordered=True, parts=False)[64]["num_stages"] == 3
    by_arrival = humming.HummingLinear(ordered=False)
    assert by_arrival.parts(packed_for(by_arrival), 64) is None


def test_parts_follow_the_multiprocessors_of_the_launch(chip: Path) -> None:
    tune(chip, buckets=[64], ordered=True, parts=True, changes={**WHOLE, "num_sms": 66})
    backend = humming.HummingLinear()
    packed = packed_for(backend)
    half = backend.parts(packed, 64)
    backend._kernels_of("kind").view(-1, 4)[:, 3] = 32
    quarter = backend.parts(packed, 64)
    assert half is not None
    assert quarter is not None
    assert (half.most, quarter.most) == (4, 2)
    backend._kernels_of("kind").view(-1, 4)[:, 3] = 16  # a block for each tile
    assert backend.parts(packed, 64) is None


def test_kernels_that_store_by_tma_leave_no_parts(chip: Path) -> None:
    by_tma = {name: value for name, value in WHOLE.items() if name != "use_tma_c"}
    tune(chip, buckets=[64], ordered=True, parts=True, changes=by_tma)
    backend = humming.HummingLinear()
    assert backend.parts(packed_for(backend), 64) is None


def test_a_launch_in_parts_says_so(chip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = humming.HummingLinear()
    packed = packed_for(backend)
    launched: list[tuple[Any, ...]] = []
    operator = SimpleNamespace(out=lambda *given: launched.append(given))
    monkeypatch.setattr(torch, "ops", SimpleNamespace(humming=SimpleNamespace(launch_kernel=operator)))
    x, parts = torch.zeros(3, 4096), torch.zeros(4, 3, 4096)
    backend.gemm(x, packed, parts[1])
    backend.gemm_in_parts(x, packed, parts)
    assert [(given[9].data_ptr(), given[9].shape, given[15]) for given in launched] == [
        (parts[1].data_ptr(), (3, 4096), 1),
        (parts.data_ptr(), (3, 4096), humming.IN_PARTS),
    ]


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("humming") is None, reason="needs a GPU and humming"
)
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 4096), (11008, 4096)])
def test_products_on_the_device(inputs: int, outputs: int) -> None:
    backend = humming.HummingLinear()
    weight = random_weight(inputs, outputs, QuantSpec(4, 128, True, False), DEVICE)
    packed = backend.prepare(weight, DEVICE, torch.float16)
    exact = dequantize(weight)
    for rows in (1, 16, 17, 40, 64, 100, 250, 600, 1500):
        x = torch.randn(rows, inputs, device=DEVICE).half()
        outs = [torch.full((rows, outputs), float("nan"), device=DEVICE, dtype=torch.float16) for _ in range(4)]
        for out in outs:
            backend.gemm(x, packed, out)
        expected = x.float() @ exact
        assert float((outs[0].float() - expected).norm() / expected.norm()) < 1.5e-3, rows
        assert all(torch.equal(outs[0], out) for out in outs[1:]), rows


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("humming") is None, reason="needs a GPU and humming"
)
@pytest.mark.parametrize("inputs", [4096, 11008])
def test_parts_on_the_device(inputs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every part that should be written is, no other, and their sum is the product; whole products are right too."""
    about = {"device": torch.cuda.get_device_name(), "bits": 4, "inputs": inputs, "outputs": 4096}
    entry = {**about, "buckets": [64, 192, 256], "ordered": True, "parts": True, "changes": {**WHOLE, **WARPS}}
    monkeypatch.setattr(humming, "TUNING", tmp_path / "tuning.json")
    humming.TUNING.write_text(json.dumps({"entries": [entry]}))
    backend = humming.HummingLinear()
    weight = random_weight(inputs, 4096, QuantSpec(4, 128, True, False), DEVICE)
    packed = backend.prepare(weight, DEVICE, torch.float16)
    exact = dequantize(weight)
    for rows in (49, 64, 150, 256):
        parts = backend.parts(packed, rows)
        assert parts is not None
        x = torch.randn(rows, inputs, device=DEVICE).half()
        out = torch.full((parts.most + 1, rows, 4096), float("nan"), device=DEVICE, dtype=torch.float16)
        backend.gemm_in_parts(x, packed, out)
        counts = parts.counts.repeat_interleave(parts.height, 0)[:rows].repeat_interleave(parts.width, 1)
        written = torch.arange(parts.most + 1, device=DEVICE)[:, None, None] < counts
        assert torch.equal(~out.isnan(), written), rows
        whole = torch.empty_like(out[0])
        backend.gemm(x, packed, whole)
        expected = x.float() @ exact
        for found in (spec.sum_of_parts(out, parts), whole.float()):
            assert float((found - expected).norm() / expected.norm()) < 1.5e-3, rows
