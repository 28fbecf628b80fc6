"""ModelSpec: every way a config says the same thing, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlaid.model.spec import UnsupportedModel, module_path, read_spec, spec_from_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def test_old_and_new_rope_settings_read_alike() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
    older = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    new = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    assert spec_from_config(old) == spec_from_config(older) == spec_from_config(new)
    assert spec_from_config(new).rope.theta == 5e5
    assert spec_from_config(new).rope.original_max_len == 64
    assert spec_from_config({**LLAMA, "rope_scaling": None}).rope.kind == "default"


def test_shapes_follow_grouped_heads_and_head_dim() -> None:
    spec = spec_from_config({**LLAMA, "head_dim": 32})
    assert spec.module_shape("q_proj") == (128, 64)
    assert spec.module_shape("k_proj") == (64, 64)
    assert spec.module_shape("o_proj") == (64, 128)
    assert spec.module_shape("down_proj") == (64, 96)
    assert spec.num_sites == 28
    assert module_path(3, "up_proj") == "model.layers.3.mlp.up_proj"


def test_sliding_windows_per_layer() -> None:
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 8, "max_window_layers": 3}
    assert spec_from_config(qwen).windows == (None,) * 4
    assert spec_from_config({**qwen, "use_sliding_window": True}).windows == (None, None, None, 8)
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert spec_from_config({**qwen, "use_sliding_window": True, "layer_types": types}).windows == (8, None, None, 8)
    assert spec_from_config({**LLAMA, "model_type": "mistral", "sliding_window": 16}).windows == (16,) * 4


def test_end_tokens_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert read_spec(tmp_path).eos_token_ids == (7, 2)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, -1, 100]}))
    assert read_spec(tmp_path).eos_token_ids == (7, 2), "-1 is none, and a vocabulary of 100 ends at 99"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2.*llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope.*yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"model_type": {}}, "model_type"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000; it must be a whole number from 1 to 4096"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings is 'long'"),
        ({"sliding_window": -4}, "sliding_window is -4"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"head_dim": 7}, "heads of width 7"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_scaling": [2]}, r"rope scaling is \[2\]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": None, "low_freq_factor": {}}}, "low_freq_factor is {}"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id must be"),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "layer_types": 5}, "layer_types 5"),
    ],
)
def test_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        spec_from_config({**LLAMA, **change})


def test_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="not a Hugging Face model folder"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="not valid JSON"):
        read_spec(tmp_path)
