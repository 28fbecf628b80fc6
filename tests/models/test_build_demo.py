"""The build script: every stage runs on a CPU in seconds, and it guards what is committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.tasks import TASKS
from models import build_demo


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    stages = [stage for stage in build_demo.STAGES if stage != "data"]
    arguments = ["--tiny", "--output", str(folder), "--workers", "1", "--device", "cpu", "--stages", *stages]
    assert build_demo.main(arguments) == 0
    return folder


def test_a_tiny_build_has_everything(built: Path) -> None:
    assert {path.name for path in (built / "base").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert {path.name for path in (built / "adapters").iterdir()} == set(TASKS)
    for task in TASKS:
        names = {path.name for path in (built / "adapters" / task).iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors"}
    points = json.loads((built / "scores.json").read_text())["points"]
    assert set(points) == {"base", "base_with_code", "adapter", "adapter_rtn4", "adapter_rtn3"}


def test_the_base_is_the_same_from_the_same_seed(built: Path, tmp_path: Path) -> None:
    arguments = ["--tiny", "--output", str(tmp_path), "--workers", "1", "--device", "cpu"]
    assert build_demo.main([*arguments, "--stages", "tokenizer", "base"]) == 0
    for name in ("tokenizer.json", "model.safetensors"):
        assert (tmp_path / "base" / name).read_bytes() == (built / "base" / name).read_bytes()


def test_steps_can_be_set() -> None:
    arguments = build_demo.parse(["--base-steps", "7", "--adapter-steps", "3"])
    assert (arguments.base_steps, arguments.adapter_steps) == (7, 3)


def test_tiny_does_not_overwrite_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert build_demo.main(["--tiny"]) == 2
    assert "--output FOLDER" in capsys.readouterr().err
