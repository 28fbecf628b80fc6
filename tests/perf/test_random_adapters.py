"""Random adapters: PEFT's own shapes and names, each different, written once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from perf.process import ROOT
from perf.random_adapters import RandomAdapters, bytes_to_make, folder_for, main, make_adapters, paths_for

BASE = ROOT / "models" / "demo" / "base"
SPEC = RandomAdapters(3, (4, 8), ("q_proj", "down_proj"))


def test_names_and_shapes_are_those_of_a_trained_adapter(tmp_path: Path) -> None:
    made = make_adapters(BASE, SPEC, tmp_path, progress=False)
    assert [name for name, _ in made] == ["random-0000-r4", "random-0001-r8", "random-0002-r4"]
    tensors = load_file(f"{made[1][1]}/adapter_model.safetensors")
    config = json.loads((BASE / "config.json").read_text())
    assert len(tensors) == config["num_hidden_layers"] * 2 * 2
    down = tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]
    assert down.shape == (8, config["intermediate_size"])
    trained = load_file(str(next((ROOT / "models" / "demo" / "adapters").glob("*/adapter_model.safetensors"))))
    assert {name.split("layers")[0] for name in tensors} == {name.split("layers")[0] for name in trained}


def test_no_two_are_alike_and_the_seed_repeats_them(tmp_path: Path) -> None:
    made = make_adapters(BASE, SPEC, tmp_path / "one", progress=False)
    again = make_adapters(BASE, SPEC, tmp_path / "two", progress=False)
    files = [Path(path, "adapter_model.safetensors").read_bytes() for _, path in made]
    assert files == [Path(path, "adapter_model.safetensors").read_bytes() for _, path in again]
    assert files[0] != files[2]


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    first = make_adapters(BASE, SPEC, tmp_path, progress=False)
    stamp = Path(first[0][1], "adapter_model.safetensors").stat().st_mtime_ns
    make_adapters(BASE, RandomAdapters(5, (4, 8), ("q_proj", "down_proj")), tmp_path, progress=False)
    assert Path(first[0][1], "adapter_model.safetensors").stat().st_mtime_ns == stamp


def test_paths_are_known_before_anything_is_written(tmp_path: Path) -> None:
    made = make_adapters(BASE, SPEC, folder_for(str(BASE), SPEC, tmp_path), progress=False)
    assert made == paths_for(str(BASE), SPEC, tmp_path)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "config.json does not exist" in capsys.readouterr().err
    assert main([str(BASE), str(tmp_path / "out"), "--targets", "q"]) == 2
    assert "unknown target q: use q_proj" in capsys.readouterr().err
    with pytest.raises(ValueError, match="ranks of at least 1"):
        RandomAdapters(1, (0,))


def test_what_is_still_to_be_written_is_known_beforehand(tmp_path: Path) -> None:
    expected = bytes_to_make(BASE, SPEC, tmp_path)
    made = make_adapters(BASE, SPEC, tmp_path, progress=False)
    tensors = [load_file(f"{path}/adapter_model.safetensors") for _, path in made]
    assert expected == sum(tensor.nbytes for one in tensors for tensor in one.values())
    assert bytes_to_make(BASE, SPEC, tmp_path) == 0
