"""A PEFT LoRA adapter as the quantizer needs it: low-rank parts by linear, attached to a model while it calibrates.

Read strictly: what changes the model in a way that is not reproduced here is refused, because a Hessian made with half
an adapter would be a wrong one, silently.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_UNSUPPORTED = ("use_dora", "modules_to_save", "layer_replication", "trainable_token_indices", "fan_in_fan_out")


class AdapterError(ValueError):
    """The adapter cannot be used; the message says why."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """What one linear gains: scale * B (A x)."""

    a_RK: Tensor
    b_NR: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank parts by the linear's name in the model; the identity is a hash of weights and configuration."""

    identity: str
    parts: dict[str, LowRank]

    @contextmanager
    def attached(self, block: nn.Module, prefix: str) -> Iterator[None]:
        """While open, the linears of `block` (named `prefix` + their name in it) compute with the adapter."""
        handles = [
            module.register_forward_hook(_hook(self.parts[prefix + name], module))
            for name, module in block.named_modules()
            if prefix + name in self.parts
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check(self, shapes: dict[str, tuple[int, int]], source: object) -> None:
        """Refuse an adapter that is not for a model whose linears have these (outputs, inputs)."""
        for name, part in self.parts.items():
            shape = (part.b_NR.shape[0], part.a_RK.shape[1])
            if name not in shapes:
                raise AdapterError(f"adapter {source} changes {name}, which is not a linear of this model's blocks")
            if shapes[name] != shape:
                raise AdapterError(f"adapter {source} is for another model: {name} is {shapes[name]} here, not {shape}")


NO_ADAPTER = Adapter("none", {})


def _hook(part: LowRank, linear: nn.Module) -> Any:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    a_RK, b_NR = part.a_RK.to(weight), part.b_NR.to(weight)

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (inputs[0] @ a_RK.T) @ b_NR.T * part.scale

    return add


def read_adapter(path: Path) -> Adapter:
    """Read a PEFT folder."""
    config_path, weights_path = path / "adapter_config.json", path / "adapter_model.safetensors"
    try:
        config = json.loads(config_path.read_text())
        tensors = load_file(weights_path)
    except FileNotFoundError as error:
        raise AdapterError(
            f"{path} is not a PEFT adapter: no {Path(str(error.filename or weights_path)).name}"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"adapter {path} cannot be read: {error}") from error
    _refuse_unsupported(path, config)
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise AdapterError(f"adapter {path} has a tensor {key} that is not a LoRA weight of a linear")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    parts = {module: _low_rank(path, module, pair, config) for module, pair in sorted(sides.items())}
    digest = hashlib.sha256(config_path.read_bytes())
    digest.update(weights_path.read_bytes())
    return Adapter(digest.hexdigest(), parts)


def _refuse_unsupported(path: Path, config: Any) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"adapter {path} is not of type LORA")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise AdapterError(f"adapter {path} uses {key}, which is not supported; merge it or train without")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"adapter {path} trains biases, which is not supported; train with bias='none'")


def _low_rank(path: Path, module: str, pair: dict[str, Tensor], config: dict[str, Any]) -> LowRank:
    if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
        raise AdapterError(f"adapter {path}: A and B of {module} do not fit each other")
    rank = _of_pattern(config.get("rank_pattern"), module, int(config["r"]))
    if pair["A"].shape[0] != rank:
        raise AdapterError(f"adapter {path}: {module} has rank {pair['A'].shape[0]}, its configuration says {rank}")
    if not all(bool(torch.isfinite(side).all()) for side in pair.values()):
        raise AdapterError(f"adapter {path}: {module} has values that are not finite")
    alpha = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return LowRank(pair["A"].contiguous(), pair["B"].contiguous(), float(scale))


def _of_pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that the module's name ends with, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
