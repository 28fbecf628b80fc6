"""Loading: every tensor has its place; shards, types and tied heads read alike; the base's version is its content."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from inlaid.checkpoint import Checkpoint
from inlaid.kernels.cpu import cpu_kernels
from inlaid.model.image import ImageError, ImageKey, WeightImage, write_image
from inlaid.model.spec import read_spec
from inlaid.model.transformer import Transformer
from inlaid.model.weights import WeightError, base_version, compute_dtype, fetch, load
from inlaid.runner.base_weights import tensors_of

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def build(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    return load(Checkpoint(folder), read_spec(folder), cpu_kernels(), CPU, dtype, max_len=64, progress=False)


def change_tensors(folder: Path, drop: str | None = None, **add: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != drop}
    save_file({**tensors, **{name.replace("__", "."): tensor for name, tensor in add.items()}}, file)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        build(folder)


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, model__layers__0__self_attn__sinks=torch.zeros(2))
    with pytest.raises(WeightError, match=r"1 tensors fit nowhere.*model\.layers\.0\.self_attn\.sinks"):
        build(folder)


def test_a_wrong_shape_is_named(folder: Path) -> None:
    change_tensors(folder, model__norm__weight=torch.zeros(31))
    with pytest.raises(WeightError, match=r"model\.norm\.weight is \(31,\), the config says \(32,\)"):
        build(folder)


def test_stored_bias_is_used_where_the_config_is_silent(folder: Path) -> None:
    change_tensors(folder, model__layers__0__self_attn__k_proj__bias=torch.ones(32))
    bias = build(folder).blocks[0].attention.qkv.bias_N
    assert bias is not None
    assert bias.tolist() == [0.0] * 32 + [1.0] * 32 + [0.0] * 32


def test_a_model_from_an_image_is_the_one_that_was_written(folder: Path, tmp_path: Path) -> None:
    change_tensors(folder, model__layers__0__self_attn__k_proj__bias=torch.ones(32))
    model, path = build(folder), tmp_path / "image"
    path.touch()
    write_image(str(path), ImageKey("1", "v", "float32", "auto"), model)
    again = load(WeightImage(str(path)), read_spec(folder), cpu_kernels(), CPU, torch.float32, 64, progress=False)
    pairs = list(zip(tensors_of(model.blocks), tensors_of(again.blocks), strict=True))
    assert len(pairs) == 2 * (4 + 2) + 1
    assert all(torch.equal(one, two) for one, two in pairs)
    with pytest.raises(ImageError, match="packed for the backend 'dense', which is not used here"):
        WeightImage(str(path)).parts("lm_head", ())
    model.head.packed = SimpleNamespace()
    with pytest.raises(ImageError, match="of the backend 'dense' are not written"):
        write_image(str(path), ImageKey("1", "v", "float32", "auto"), model)


def test_shards_and_one_file_are_the_same_model(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    one, many = build(folder), build(tmp_path / "shards")
    for a, b in zip(one.blocks, many.blocks, strict=True):
        assert torch.equal(a.gate_up.parts[0][1].weight_KN, b.gate_up.parts[0][1].weight_KN)
    assert torch.equal(one.head.packed.weight_KN, many.head.packed.weight_KN)


def test_compute_type(folder: Path) -> None:
    spec = read_spec(folder)
    assert compute_dtype("auto", spec, CPU) is torch.float32
    assert compute_dtype("bfloat16", spec, CPU) is torch.bfloat16
    assert compute_dtype("auto", spec, torch.device("cuda")) is torch.float16
    assert build(folder, torch.bfloat16).embedding.weight_VD.dtype is torch.bfloat16


def test_version_is_the_content(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = base_version(Checkpoint(folder))
    assert base_version(Checkpoint(folder)) == first
    stored = json.loads((tmp_path / "cache" / "inlaid" / "versions.json").read_text())
    assert stored[str(folder.resolve())]["version"] == first
    change_tensors(folder, model__norm__weight=torch.full((32,), 2.0))
    second = base_version(Checkpoint(folder))
    assert second != first
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert base_version(Checkpoint(folder)) == second


def test_fetch_says_what_it_was_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(str(folder)) == folder
    with pytest.raises(WeightError, match="neither a folder on this machine nor a hub id"):
        fetch("./nowhere")

    def no_network(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    with pytest.raises(WeightError, match="the hub cannot be reached"):
        fetch("owner/name")
