"""ModelSpec: the content of a Hugging Face config.json, read once into one frozen value. Weights, layers,
adapters and the engine read it; an architecture or option that would be computed wrongly is refused here by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from inlaid.files import read_bounded
from inlaid.kernels.backend import MODULES
from inlaid.layers.rotary import ROPE_KINDS, RopeSpec


class UnsupportedModel(ValueError):
    """The model cannot be served right; the message says what is wrong and what would do."""


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of the Llama kind."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_len: int  # positions the model was made for
    rope: RopeSpec
    windows: tuple[int | None, ...]  # per layer; None sees everything
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    dtype: str = "float32"  # of the stored weights, as the config names it
    eos_token_ids: tuple[int, ...] = ()
    quantized: bool = False

    @property
    def num_sites(self) -> int:
        """Return the number of places that an adapter can act on, numbered layer * 7 + module."""
        return self.num_layers * len(MODULES)

    def module_shape(self, module: str) -> tuple[int, int]:
        """Return (output, input) features of one of MODULES."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden_size),
            "k_proj": (kv, self.hidden_size),
            "v_proj": (kv, self.hidden_size),
            "o_proj": (self.hidden_size, q),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }[module]


def module_path(layer: int, module: str) -> str:
    """Return the path of a linear in a Hugging Face model."""
    block = "self_attn" if module in MODULES[:4] else "mlp"
    return f"model.layers.{layer}.{block}.{module}"


def read_spec(folder: Path) -> ModelSpec:
    """Return the spec of a model folder; end-of-sequence ids come from generation_config.json too."""
    config = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    more = _read_json(generation) if generation.exists() else {}
    try:
        return spec_from_config(config, more)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{folder}: {error}") from None


def spec_from_config(config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelSpec:
    """Read a config of any version: rope_theta and rope_scaling, or rope_parameters."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise UnsupportedModel(f"model_type {kind!r} is not supported; supported: {known}")
    _require(config, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    _check(config, "config.json")
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"hidden_act {config['hidden_act']!r} is not supported; supported: silu")
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise UnsupportedModel(f"{num_heads} attention heads cannot share {num_kv_heads} key/value heads evenly")
    head_dim = config.get("head_dim") or (128 if kind == "qwen3" else config["hidden_size"] // num_heads)
    if head_dim < 2 or head_dim % 2:
        raise UnsupportedModel(f"heads of width {head_dim} cannot be rotated in halves")
    max_len = config.get("max_position_embeddings") or 2048
    return ModelSpec(
        architecture=kind,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        max_len=max_len,
        rope=_rope(config, max_len),
        tied=bool(config.get("tie_word_embeddings", False)),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        eos_token_ids=_eos(config, generation or {}),
        quantized="quantization_config" in config,
        **_FAMILIES[kind](config),
    )


def _llama(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {
        "windows": (None,) * config["num_hidden_layers"],
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }


def _mistral(config: dict[str, Any]) -> dict[str, Any]:
    return {"windows": (config.get("sliding_window"),) * config["num_hidden_layers"]}


def _qwen2(config: dict[str, Any]) -> dict[str, Any]:
    return {"windows": _layer_windows(config), "qkv_bias": True}


def _qwen3(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"windows": _layer_windows(config), "qkv_bias": bias, "output_bias": bias, "qk_norm": True}


_FAMILIES = MappingProxyType({"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3})


def _layer_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """Return each layer's window: Qwen's layers slide from `max_window_layers` on, or as `layer_types` says, if sliding
    is switched on at all."""
    num_layers = config["num_hidden_layers"]
    window: int | None = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    if window is None:
        return (None,) * int(num_layers)
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers")
        first = 28 if first is None else first
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or any(name not in known for name in types):
        raise UnsupportedModel(f"layer_types {types} is not supported for {num_layers} layers")
    return tuple(window if name == "sliding_attention" else None for name in types)


def _rope(config: dict[str, Any], max_len: int) -> RopeSpec:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UnsupportedModel(f"config.json: rope scaling is {scaling!r}; it must be an object")
    _check(scaling, "config.json, rope scaling")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(f"rope scaling type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor {partial} is not supported; only whole heads are rotated")
    original = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    original = original or max_len
    factor = scaling.get("factor")
    if factor is None:
        factor = max_len / original if kind == "yarn" else 1.0
    return RopeSpec(
        theta=float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0),
        kind=kind,
        factor=float(factor),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_max_len=int(original),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        attention_factor=scaling.get("attention_factor"),
        mscale=scaling.get("mscale"),
        mscale_all_dim=scaling.get("mscale_all_dim"),
        truncate=bool(scaling.get("truncate", True)),
    )


def _eos(config: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    """Return the ids of both files, in their order, without those that end nothing: -1, which stands for none in some
    files, and ids outside the vocabulary."""
    ids: list[int] = []
    for source in (generation, config):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int for one in ids):
        raise UnsupportedModel(f"eos_token_id must be a token's id, or a list of them, not {ids}")
    return tuple(one for one in dict.fromkeys(ids) if 0 <= one < config["vocab_size"])


_WHOLE: Mapping[str, tuple[int, int]] = MappingProxyType({  # fields that are whole numbers, and their bounds
    "vocab_size": (1, 1 << 24), "hidden_size": (1, 1 << 20), "intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 1 << 12), "num_attention_heads": (1, 1 << 16), "num_key_value_heads": (0, 1 << 16),
    "head_dim": (0, 1 << 16), "max_position_embeddings": (1, 1 << 31), "max_window_layers": (0, 1 << 12),
    "sliding_window": (1, 1 << 31), "original_max_position_embeddings": (0, 1 << 31),
})  # fmt: skip
_NUMBERS = (  # fields that are finite numbers from 0 on
    "rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "attention_factor", "mscale", "mscale_all_dim", "partial_rotary_factor",
)  # fmt: skip


def _check(config: dict[str, Any], where: str) -> None:
    """Refuse fields that are there, and not null, but not what they must be."""
    for name, (least, most) in _WHOLE.items():
        value = config.get(name)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise UnsupportedModel(f"{where}: {name} is {value!r}; it must be a whole number from {least} to {most}")
    for name in _NUMBERS:
        value = config.get(name)
        if value is not None and (type(value) not in (int, float) or not 0 <= value < math.inf):
            raise UnsupportedModel(f"{where}: {name} is {value!r}; it must be a number from 0 on")


def _require(config: dict[str, Any], *keys: str) -> None:
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise UnsupportedModel(f"config.json lacks {', '.join(missing)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_bounded(path).decode())
    except FileNotFoundError:
        raise UnsupportedModel(f"{path} does not exist: this is not a Hugging Face model folder") from None
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path} does not hold an object")
    return value
