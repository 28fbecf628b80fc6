"""Reading PEFT folders: what is accepted means what peft means by it, and all else is refused with its reason."""

from __future__ import annotations

import json
import math
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from inlaid.adapters.adapter import AdapterError, site_path
from inlaid.adapters.peft import read_adapter
from inlaid.model.spec import ModelSpec, spec_from_config

CONFIG = LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8,
)  # fmt: skip
SPEC: ModelSpec = spec_from_config(CONFIG.to_dict())
QV = ["q_proj", "v_proj"]


def write(folder: Path, **settings: Any) -> Path:
    """Write an adapter with peft, with random factors."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_config(CONFIG), LoraConfig(init_lora_weights=False, **settings))
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def edit_weights(folder: Path, change: Any) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return folder


def read(folder: Path, **options: Any) -> Any:
    return read_adapter(folder, SPEC, torch.float32, **options)


ACCEPTED: list[dict[str, Any]] = [
    {"r": 4, "target_modules": QV},
    {"r": 3, "target_modules": "all-linear", "lora_alpha": 5},
    {"r": 4, "target_modules": ["up_proj"], "use_rslora": True, "lora_alpha": 6},
    {"r": 2, "target_modules": [*QV, "down_proj"], "layers_to_transform": [0, 2]},
    {"r": 2, "target_modules": QV, "layers_to_transform": 1, "layers_pattern": "layers"},
    {"r": 2, "target_modules": r".*layers\.[01]\.(self_attn\.k_proj|mlp\.gate_proj)"},
    {"r": 2, "target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    {"r": 2, "target_modules": ["model.layers.1.self_attn.o_proj"]},
    {
        "r": 4,
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rank_pattern": {"o_proj": 7, r"layers\.1\.self_attn\.q_proj": 1, "proj": 9},
        "alpha_pattern": {r".*\.2\.mlp\.up_proj": 11, "self_attn.o_proj": 3},
    },
]


@pytest.mark.parametrize("settings", ACCEPTED)
def test_reads_what_peft_means(settings: dict[str, Any], tmp_path: Path) -> None:
    """Every adapted module of peft's own model, with its product scale * B @ A, and no other."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_config(CONFIG), LoraConfig(init_lora_weights=False, **settings))
    model.save_pretrained(tmp_path)
    adapter = read(tmp_path)
    layers = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {site_path(entry.site) for entry in adapter.entries} == set(layers)
    for entry in adapter.entries:
        layer = layers[site_path(entry.site)]
        outputs, inputs = layer.base_layer.weight.shape
        a = adapter.flat[entry.a_start : entry.a_start + entry.rank * inputs].view(entry.rank, inputs)
        b = adapter.flat[entry.b_start : entry.b_start + outputs * entry.rank].view(outputs, entry.rank)
        torch.testing.assert_close(entry.scale * b @ a, layer.get_delta_weight("default"))
        assert entry.a_start % 64 == 0
        assert entry.b_start % 64 == 0
    assert adapter.rank == max(layer.r["default"] for layer in layers.values())


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model."),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.removeprefix("base_model.model.model."),
        lambda name: name.replace(".lora_A.weight", ".lora_A.default.weight"),
        lambda name: "base_model.model." + name,
    ],
)
def test_prefixes(rename: Any, tmp_path: Path) -> None:
    write(tmp_path / "a", r=4, target_modules=QV)
    want = read(tmp_path / "a")
    edit_weights(tmp_path / "a", lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    assert torch.equal(read(tmp_path / "a").flat, want.flat)


def test_identity_is_the_content(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", r=4, target_modules=QV), write(tmp_path / "b", r=4, target_modules=QV)
    for folder in (one, two):  # peft writes target_modules from a set
        edit_config(folder, target_modules=QV)
    assert read(one).identity == read(two).identity
    edit_config(two, lora_alpha=99)
    assert read(one).identity != read(two).identity
    edit_weights(one, lambda tensors: {name: tensor * 1.5 for name, tensor in tensors.items()})
    assert (
        len({read(one).identity, read(two).identity, read(write(tmp_path / "c", r=4, target_modules=QV)).identity}) == 3
    )


def nested(depth: int) -> list[Any]:
    """Return a list in a list in a list."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


REFUSED_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "DoRA is computed from the base"),
    ({"modules_to_save": ["lm_head"]}, "names lm_head but there is no tensor of its weight"),
    ({"bias": "all"}, "bias 'all'"),
    ({"fan_in_fan_out": True}, "Conv1D"),
    ({"lora_bias": True}, "lora_bias is computed from"),
    ({"use_dora": True, "lora_bias": True}, "DoRA with lora_bias"),
    ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ({"peft_type": None}, "peft_type None"),
    ({"init_lora_weights": "pissa_niter_16"}, "changes the base weights"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"trainable_token_indices": [1]}, "names embed_tokens but there is no tensor of its trained tokens"),
    ({"alora_invocation_tokens": [1]}, "alora"),
    ({"target_parameters": ["x"]}, "target_parameters"),
    ({"some_new_method": {"k": 1}}, "some_new_method"),
    ({"r": 0}, "r must be"),
    ({"r": "8"}, "r must be"),
    ({"r": 5}, "has rank 4, the config says 5"),
    ({"rank_pattern": {"v_proj": 2}}, "v_proj has rank 4, the config says 2"),
    ({"rank_pattern": {"(": 2}}, "not a regular expression"),
    ({"rank_pattern": ["v_proj"]}, "rank_pattern must map"),
    ({"lora_alpha": None}, "lora_alpha"),
    ({"lora_alpha": float("inf")}, "lora_alpha"),
    ({"lora_alpha": 0}, "lora_alpha is 0, so it changes nothing"),
    ({"target_modules": None}, "target_modules"),
    ({"target_modules": []}, "target_modules"),
    ({"target_modules": ["q_proj"]}, r"tensors for model\.layers\.0\.self_attn\.v_proj, which the config does not"),
    ({"target_modules": [*QV, "k_proj"]}, r"targets model\.layers\.0\.self_attn\.k_proj but there are no tensors"),
    ({"target_modules": [*QV, "lm_head"]}, "names lm_head but there is no tensor of its lora_A"),
    ({"target_modules": "["}, "not a regular expression"),
    ({"layers_to_transform": 1, "layers_pattern": 5}, "layers_pattern is 5"),
    ({"layers_to_transform": 1, "layers_pattern": "q_proj|k_proj"}, "layers_pattern 'q_proj|k_proj' is not supported"),
    ({"layers_to_transform": 1, "layers_pattern": "q_proj"}, "which the config does not target"),
    ({"layers_to_transform": [0]}, "does not target"),
    ({"layers_to_transform": "0"}, "layers_to_transform"),
    ({"lora_alpha": 10**400}, "lora_alpha must be a number, and finite"),
    ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern.*finite"),
    ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern.*finite"),
    ({"rank_pattern": {"q_proj": math.inf}}, "rank_pattern.*finite"),
    ({"rank_pattern": {"q_proj": 2.5}}, "a rank is a whole number"),
    ({"rank_pattern": {"(a+)+$": 4, "(.*)*_x": 5}, "r": 5}, "has rank 4, the config says 5"),
    ({"target_modules": r"(?:\w+\.?)*!"}, "does not target"),
    ({"target_modules": r"(.)\1"}, "back-references"),
    ({"target_modules": nested(800)}, "target_modules must be"),
    ({"some_new_method": nested(800)}, "some_new_method"),
    ({"exclude_modules": 3}, "exclude_modules must be"),
    ({"lora_alpha": 1e30}, "amplifies its input"),
    ({"peft_type": "\ud800\n500 OK"}, r"peft_type '\\ud800\\n500 OK'"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED_SETTINGS)
def test_settings_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    edit_config(write(tmp_path, r=4, target_modules=QV), **change)
    with pytest.raises(AdapterError, match=reason) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = A0.replace("lora_A", "lora_B")


def without(name: str) -> Any:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def put(name: str, value: Any) -> Any:
    return lambda tensors: {**tensors, name: value(tensors) if callable(value) else value}


REFUSED_WEIGHTS: list[tuple[Any, str]] = [
    (without(B0), "q_proj has no lora_B"),
    (without(A0), "q_proj has no lora_A"),
    (put("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 16)), "tensors for lm_head, which the config"),
    (put("base_model.model.lm_head.weight", torch.zeros(4, 16)), "the whole output head.*save_embedding_layers=False"),
    (
        put("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 50)),
        "tensors for embed_tokens, which the config",
    ),
    (put(A0.replace("lora_A.weight", "lora_magnitude_vector"), torch.zeros(16)), "DoRA"),
    (put(B0.replace("weight", "bias"), torch.zeros(16)), "biases"),
    (put(A0.replace("layers.0", "layers.7"), torch.zeros(4, 16)), "no such module"),
    (put(A0.replace("self_attn", "mlp"), torch.zeros(4, 16)), "no such module"),
    (put("something.else", torch.zeros(1)), "something.else fits nowhere"),
    (put(A0.removeprefix("base_model.model."), torch.zeros(4, 16)), "two tensors claim lora_A"),
    (put(A0, torch.zeros(4, 17)), "made for another base"),
    (put(A0, torch.zeros(16)), "made for another base"),
    (put(A0, torch.zeros(3, 16)), "A has rank 3 and B has rank 4"),
    (put(A0, torch.zeros(4, 16, dtype=torch.int64)), "not a floating-point type"),
    (put(A0, lambda tensors: tensors[A0].index_fill(0, torch.tensor([1]), math.nan)), "NaN or infinity"),
    (put(B0, lambda tensors: tensors[B0] * math.inf), "NaN or infinity"),
    (put(B0, torch.full((16, 4), 3e38)), r"q_proj amplifies its input up to 1.25e\+39 times"),
    (put(A0, torch.full((4, 16), -1e20)), "amplifies its input"),
    (put("lines\nof\tlogs", torch.zeros(1)), r"tensor lines\\nof\\tlogs fits nowhere"),
    (lambda tensors: {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, "changes nothing"),
    (lambda tensors: {}, "empty"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED_WEIGHTS)
def test_weights_refused(change: Any, reason: str, tmp_path: Path) -> None:
    edit_weights(write(tmp_path, r=4, target_modules=QV), change)
    with pytest.raises(AdapterError, match=reason):
        read(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, r=4, target_modules=QV) / "adapter_model.safetensors"
    whole = file.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(AdapterError, match="damaged or cut short"):
            read(tmp_path)


def test_pickles_and_bare_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="not a PEFT adapter"):
        read(tmp_path)
    write(tmp_path, r=4, target_modules=QV)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled"):
        read(tmp_path)
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    for text in ("[", "[" * 100_000, "\ud800".encode("utf-16", "surrogatepass").hex(), "\x00"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=r"not valid JSON|does not hold an object"):
            read(tmp_path)


def test_limits(tmp_path: Path) -> None:
    write(tmp_path, r=4, target_modules=QV)
    with pytest.raises(AdapterError, match=re.escape("above the limit of 3 (--max-lora-rank)")):
        read(tmp_path, max_rank=3)
    edit_weights(tmp_path, lambda tensors: {name: tensor * 1e6 for name, tensor in tensors.items()})
    with pytest.raises(AdapterError, match=r"does not fit into torch\.float16"):
        read_adapter(tmp_path, SPEC, torch.float16)


def test_no_more_is_read_than_config_and_base_account_for(tmp_path: Path) -> None:
    """A sparse file of 5 GiB takes no room on disk, but would take it in memory."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        folder = write(tmp_path / name, r=4, target_modules=QV)
        with (folder / name).open("r+b") as file:
            file.truncate(5 << 30)
        tracemalloc.start()
        with pytest.raises(AdapterError, match=f"{name} has 5368709120 bytes"):
            read(folder)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    folder = write(tmp_path / "header", r=4, target_modules=QV)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.write((2 << 20).to_bytes(8, "little"))
        file.truncate((1 << 20) + (50 << 10))
    with pytest.raises(AdapterError, match="a header of 2097152"):
        read(folder)


def test_a_config_of_many_names_takes_bounded_time(tmp_path: Path) -> None:
    folder = write(tmp_path, r=4, target_modules=QV)
    many = [f"n{number}" for number in range(20_000)]
    for change, reason in (
        ({"target_modules": many}, "target module 'n0' is none"),
        ({"exclude_modules": many, "r": 5}, "has rank 4, the config says 5"),
        ({"rank_pattern": {f"{name}_": 3 for name in many}}, None),
        ({"rank_pattern": {f"({name}){{50}}": 3 for name in many}}, "take too long to match"),
    ):
        edit_config(folder, **{"target_modules": QV, "r": 4, "exclude_modules": None, "rank_pattern": {}} | change)
        if reason is None:
            read(folder)
        else:
            with pytest.raises(AdapterError, match=reason):
                read(folder)


def test_the_gain_that_is_safe_depends_on_the_type(tmp_path: Path) -> None:
    folder = write(tmp_path, r=4, target_modules=QV, lora_alpha=4000)
    assert read(folder).rank == 4
    with pytest.raises(AdapterError, match=r"more than the 256 that are safe in torch\.float16"):
        read_adapter(folder, SPEC, torch.float16)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_change_while_they_are_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    folder = write(tmp_path, r=2, target_modules=QV)
    original = Path.read_bytes

    def meanwhile(path: Path) -> bytes:
        data = original(path)
        if path.name == "adapter_config.json":  # it is read last
            (folder / file).write_bytes(original(folder / file) + b" ")
        return data

    monkeypatch.setattr(Path, "read_bytes", meanwhile)
    with pytest.raises(AdapterError, match="changed while they were read"):
        read(folder)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Reading a pipe would never end."""
    folder = write(tmp_path, r=2, target_modules=QV)
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is not a regular file"):
        read(folder)
