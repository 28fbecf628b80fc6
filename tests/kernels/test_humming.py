"""Which parameters humming's kernels get, with a stand-in for the package; and on a GPU that has it, its products: the
right values and the same bits again, for numbers of rows in every kind of bucket."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inlaid.checkpoint import QuantSpec, dequantize
from inlaid.kernels import early, humming
from inlaid.kernels.measure import random_weight

DEVICE = torch.device("cuda")
LAYER: Any = SimpleNamespace(
    shape_k=4096, shape_n=4096, weight_scale_group_size=128, b_dtype=SimpleNamespace(num_bits=4)
)


def package(config: Any, shape_m: int, device: torch.device) -> dict[str, Any]:
    """A choice of parameters like the package's: more slices than keep the order, at every number of rows."""
    if shape_m <= 32:
        height = -(-shape_m // 8) * 8
        return {"mma_type": "mma", "block_shape": (height, 128, 128), "warp_shape": (height, 64, 32), "num_stages": 4,
                "num_ctas_per_sm": 1, "use_stream_k": True, "use_tma": False}  # fmt: skip
    height = min(shape_m, 128)
    return {"mma_type": "wgmma", "block_shape": (height, 128, 64), "warp_shape": (height, 32, 64), "num_stages": 4,
            "num_ctas_per_sm": 2, "use_stream_k": True, "use_tma": True}  # fmt: skip


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A device of 132 multiprocessors with an empty table of tuned parameters."""
    monkeypatch.setattr(humming, "_import", lambda: SimpleNamespace(heuristics=package))
    monkeypatch.setattr(humming, "TUNING", tmp_path / "tuning.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "chip")
    properties = SimpleNamespace(multi_processor_count=132)
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
