"""The config and the tensors of a Llama-like model in a GGUF file, by the names and in the layout of transformers.

llama.cpp rotates neighbours (x[2i], x[2i + 1]); transformers rotates halves (x[i], x[i + d/2]). In GGUF files of the
architecture `llama` the rows of q_proj and k_proj are therefore permuted within each head:
    row 2i + j of a head in the file = row j * d/2 + i of the head in transformers, j in (0, 1)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from inlaid.convert.gguf_file import ConvertError, GGUFFile

Array = np.ndarray[Any, Any]

CLASSES = MappingProxyType({"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"})
_TOP = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
)
_BLOCK = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)


def config_of(file: GGUFFile) -> dict[str, Any]:
    """Return config.json. ConvertError: the model is of a kind that would be computed wrongly."""
    fields = file.fields
    kind = str(fields.get("general.architecture"))
    if kind not in CLASSES:
        raise ConvertError(
            f"{file.path} holds the architecture {kind!r}; read are {', '.join(CLASSES)}. Give its Hugging Face folder"
        )

    def field(name: str, *default: Any) -> Any:
        if not default and f"{kind}.{name}" not in fields:
            raise ConvertError(f"{file.path} lacks the field {kind}.{name}; fetch it again")
        return fields.get(f"{kind}.{name}", *default)

    refused = [name for name in fields if re.search(r"\.(expert_count|sliding_window)$", name) and fields[name]]
    scaling = field("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        refused.append(f"{kind}.rope.scaling.type = {scaling}")
    if "rope_freqs.weight" in file.tensors:
        refused.append("rope_freqs.weight")
    hidden, heads = field("embedding_length"), field("attention.head_count")
    head_dim = field("attention.key_length", hidden // max(1, heads))
    if field("rope.dimension_count", head_dim) != head_dim:
        refused.append(f"{kind}.rope.dimension_count")
    if refused:
        raise ConvertError(
            f"{file.path} has {', '.join(refused)}, which a GGUF file does not say enough about to be computed "
            "exactly; give the model's Hugging Face folder"
        )
    config = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0,
        "hidden_size": hidden,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": round(float(field("attention.layer_norm_rms_epsilon")), 12),
        "rope_theta": float(field("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float16",
    }
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": float(field("rope.scaling.factor"))}
    if kind == "llama":
        config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return config | _token_ids(fields)


def generation_of(file: GGUFFile) -> dict[str, Any]:
    """Return generation_config.json."""
    return _token_ids(file.fields)


def _token_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    return {name: value for name, value in found.items() if value is not None}


def names_of(file: GGUFFile) -> dict[str, str]:
    """Return the name in the file of each tensor by its name in transformers, in order of the file."""
    names = {}
    for name in file.tensors:
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        layer, part, what = found.groups() if found else (None, "", "")
        known = _TOP if layer is None else _BLOCK
        if part not in known:
            raise ConvertError(f"{file.path} has a tensor {name}, which no model of this kind has")
        prefix = "" if layer is None else f"model.layers.{layer}."
        names[f"{prefix}{known[part]}.{what}"] = name
    return names


def tensor_of(file: GGUFFile, name: str, config: Mapping[str, Any]) -> Array:
    """Return a tensor by its name in the file, in the layout of transformers."""
    tensor = file.read(name)
    part = name.split(".")[-2]
    if config["model_type"] != "llama" or part not in ("attn_q", "attn_k"):
        return tensor
    heads = config["num_attention_heads"] if part == "attn_q" else config["num_key_value_heads"]
    if not heads or tensor.shape[0] % (2 * heads):
        raise ConvertError(f"{file.path}: {name} has {tensor.shape[0]} rows, which {heads} heads cannot share")
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
