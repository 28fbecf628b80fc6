"""Serving, quantizing and evaluating read adapters alike: one identity, one set of refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.oracle import OracleBackend
from inlaid.adapters.adapter import AdapterError
from inlaid.adapters.peft import identity_of
from inlaid.config import AdapterConfig, EngineConfig
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.plan import Plan
from inlaid.quant.settings import Place, Settings, TaskSource
from inlaid.worker.loading import adapter_reader, open_model

BASE, MATHS = Path("models/demo/base"), Path("models/demo/adapters/maths")
CALIBRATION = Path("data/maths/calibration.jsonl")


def serve(folder: Path) -> str:
    """Read an adapter as the server does; returns its identity."""
    return adapter_reader(AdapterConfig(), open_model(EngineConfig(model=str(BASE))))(str(folder)).identity


def quantize(folder: Path) -> str:
    """Read an adapter as the quantizer does; returns the identity for `inlaid.json` and the bank."""
    settings = Settings(calibration=CalibrationSettings(max_tokens=100))
    return Plan(BASE, [TaskSource("t", folder, CALIBRATION)], settings, Place()).tasks[0].adapter_identity


def evaluate(folder: Path) -> str:
    """Read an adapter as the evaluation does; returns the identity for its records."""
    refused = OracleBackend(BASE, {"a": folder}).refused
    if refused:
        raise AdapterError(refused["a"])
    return identity_of(folder)


RAILS = [serve, quantize, evaluate]


def test_the_demo_has_one_identity_on_all_rails() -> None:
    assert {rail(MATHS)[:8] for rail in RAILS} == {"332a1dc7"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
    ({"use_dora": True, "lora_bias": True}, "DoRA"),
    ({"modules_to_save": ["norm"]}, "modules_to_save"),
    ({"alpha_pattern": {"q_proj": math.nan}}, "finite"),
    ({"lora_alpha": 1e30}, "amplifies"),
    ({"unheard_of": 1}, "unheard_of"),
]


@pytest.mark.parametrize("rail", RAILS)
@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_refusals_are_the_same(
    rail: Callable[[Path], str], change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(MATHS, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=reason):
        rail(folder)


@pytest.mark.parametrize("rail", RAILS)
def test_values_are_refused_alike(rail: Callable[[Path], str], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(MATHS, folder)
    file = folder / "adapter_model.safetensors"
    save_file({name: torch.full(tensor.shape, 3e38) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match="amplifies"):
        rail(folder)
