"""Reads a PEFT folder into an Adapter, or refuses it with its reason. Safetensors only. The store and the command line
call `read_adapter`; it touches no shared state, so it may run in a thread.

An adapter is refused, never served in part: every tensor must be a LoRA factor of a linear that the base has, every
module that the config targets must have both factors, and every setting that would change the result and is not
computed here is named.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inlaid.kernels.backend import MODULES
from inlaid.model.spec import ModelSpec, module_path
from inlaid.tensorfiles import CheckpointError, tensors_in

ALIGNMENT = 64  # elements; each matrix starts at a multiple, so that a kernel may load wide words


class AdapterError(ValueError):
    """An adapter cannot be served right; the message says why."""


@dataclass(frozen=True)
class AdapterEntry:
    """One adapted linear: where A [rank, K] and B [N, rank] lie in the adapter's flat tensor."""

    site: int
    a_start: int
    b_start: int
    end: int
    rank: int
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter in host memory, in the compute type. `identity` is the hash of its files."""

    identity: str
    path: str
    flat: torch.Tensor
    entries: tuple[AdapterEntry, ...]

    @property
    def rank(self) -> int:
        return max(entry.rank for entry in self.entries)


def read_adapter(
    path: str | Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    max_rank: int = 256,
    allow_noop: bool = False,
    pin: bool = False,
) -> Adapter:
    """Read, check and lay out one adapter, with `pin` in memory that a GPU can copy from by itself."""
    folder = Path(path)
    config_bytes, weight_bytes = _read_files(folder)
    try:
        config = _parse_config(config_bytes)
        tensors = _parse_weights(weight_bytes)
        factors = _pair(tensors, spec)
        _check_targets(config, factors, spec)
        scales = {site: _scale(config, site, a.shape[0]) for site, (a, _) in factors.items()}
        _check_ranks(config, factors, max_rank)
        if not allow_noop and all(scales[site] == 0 or not b.any() for site, (_, b) in factors.items()):
            raise AdapterError("every B is zero, so it changes nothing; it looks untrained")
        identity = hashlib.sha256(hashlib.sha256(config_bytes).digest())
        identity.update(weight_bytes)
        adapter = lay_out(identity.hexdigest(), str(folder), factors, scales, dtype, pin)
        if not _is_finite(adapter.flat):
            _check_values(factors, dtype)
    except AdapterError as error:
        raise AdapterError(f"adapter {folder}: {error}") from None
    return adapter


def _read_files(folder: Path) -> tuple[bytes, memoryview]:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not folder.is_dir():
        raise AdapterError(f"adapter {folder}: there is no such folder")
    if not config.exists():
        raise AdapterError(f"adapter {folder}: it has no adapter_config.json, so it is not a PEFT adapter")
    if not weights.exists():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise AdapterError(
                f"adapter {folder}: its weights are pickled, which can run code when read; "
                "save it as adapter_model.safetensors"
            )
        raise AdapterError(f"adapter {folder}: it has no adapter_model.safetensors")
    before = [_state(file) for file in (config, weights)]
    data = np.empty(weights.stat().st_size, np.uint8).data  # a bytearray would be filled first, and hold up all threads
    with weights.open("rb") as file:
        whole = file.readinto(data) == len(data)
    read = config.read_bytes(), data
    if not whole or [_state(file) for file in (config, weights)] != before:
        raise AdapterError(f"adapter {folder}: its files changed while they were read; load it when they are at rest")
    return read


def _state(file: Path) -> tuple[int, int, int]:
    """What differs when somebody writes or replaces a file."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise AdapterError(f"adapter {file.parent}: {file.name} is not a regular file")
    return found.st_ino, found.st_size, found.st_mtime_ns


# Settings that change nothing about a trained adapter's result, or that are read below.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "loftq_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "alpha_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "bias",
}  # fmt: skip
_REASONS = {
    "use_dora": "DoRA is not supported",
    "modules_to_save": "modules_to_save (whole layers trained beside the adapter) is not supported",
    "fan_in_fan_out": "fan_in_fan_out is for Conv1D layers, which the base does not have",
    "lora_bias": "lora_bias (biases in B) is not supported",
    "trainable_token_indices": "trained embeddings (trainable_token_indices) are not supported",
    "layer_replication": "layer_replication changes the base and is not supported",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens) is not supported",
    "target_parameters": "target_parameters is not supported; only linear modules are adapted",
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base weights too


def _parse_config(data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"adapter_config.json is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError("adapter_config.json does not hold an object")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type {config.get('peft_type')!r} is not supported; supported: LORA")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"bias {config['bias']!r} is not supported; only none")
    for key, value in config.items():
        if key not in _HARMLESS and value not in (None, False, [], {}):
            raise AdapterError(_REASONS.get(key, f"setting {key} = {value!r} is not supported"))
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise AdapterError(
            f"init_lora_weights {config['init_lora_weights']!r} changes the base weights; "
            "convert it to a plain LoRA (PEFT's path_initial_model_for_weight_conversion) and save it again"
        )
    _check_types(config)
    return config


def _check_types(config: Mapping[str, Any]) -> None:
    r, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise AdapterError(f"r must be a whole number above 0, not {r!r}")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise AdapterError(f"lora_alpha must be a number, not {alpha!r}")
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets)
    ):
        raise AdapterError(f"target_modules must be a list of names or a pattern, not {targets!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(isinstance(v, (int, float)) for v in pattern.values()):
            raise AdapterError(f"{key} must map patterns to numbers")
    indices = config.get("layers_to_transform")
    if indices is not None and not isinstance(indices, (int, list)):
        raise AdapterError(f"layers_to_transform must be a layer or a list of layers, not {indices!r}")


def _parse_weights(data: memoryview) -> dict[str, torch.Tensor]:
    try:
        tensors = tensors_in(data)
    except CheckpointError as error:
        raise AdapterError(f"adapter_model.safetensors is damaged or cut short ({error})") from None
    if not tensors:
        raise AdapterError("adapter_model.safetensors is empty")
    return tensors


_FACTOR = re.compile(
    r"(?:(?:base_model|model)\.)*layers\.(?P<layer>\d+)\.(?P<block>self_attn|mlp)\.(?P<module>\w+)"
    r"\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight"
)

Factors = dict[int, tuple[torch.Tensor, torch.Tensor]]  # site -> A [rank, K], B [N, rank]


def _pair(tensors: Mapping[str, torch.Tensor], spec: ModelSpec) -> Factors:
    """Find each tensor its place; shapes must be the base's."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        site, factor = _place(name, spec)
        if factor in found.setdefault(site, {}):
            raise AdapterError(f"two tensors claim lora_{factor} of {site_path(site)}")
        found[site][factor] = tensor
    factors = {}
    for site in sorted(found):
        missing = {"A", "B"} - set(found[site])
        if missing:
            raise AdapterError(f"{site_path(site)} has no lora_{missing.pop()}")
        factors[site] = _check_shape(site, found[site]["A"], found[site]["B"], spec)
    return factors


def _place(name: str, spec: ModelSpec) -> tuple[int, str]:
    match = _FACTOR.fullmatch(name)
    if match is None:
        for sign, reason in _FOREIGN.items():
            if sign in name:
                raise AdapterError(f"tensor {name}: {reason}")
        raise AdapterError(f"tensor {name} fits nowhere in a {spec.architecture} model")
    layer, module = int(match["layer"]), match["module"]
    right_block = module in MODULES and (module in MODULES[:4]) == (match["block"] == "self_attn")
    if not right_block or layer >= spec.num_layers:
        raise AdapterError(f"tensor {name}: the base has no such module (it has {spec.num_layers} layers)")
    return layer * len(MODULES) + MODULES.index(module), match["factor"]


_FOREIGN = {
    "lora_magnitude_vector": "DoRA is not supported",
    "modules_to_save": "modules_to_save is not supported",
    "lora_embedding": "adapters of the embedding are not supported",
    "embed_tokens": "adapters of the embedding are not supported",
    "lm_head": "adapters of the output head are not supported",
    ".bias": "adapters with biases are not supported",
}


def _check_shape(site: int, a: torch.Tensor, b: torch.Tensor, spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, inputs = spec.module_shape(MODULES[site % len(MODULES)])
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != inputs or b.shape[0] != outputs:
        raise AdapterError(
            f"{site_path(site)} has A {tuple(a.shape)} and B {tuple(b.shape)}, "
            f"made for another base: this one's layer is {inputs} to {outputs}"
        )
    for factor, tensor in (("A", a), ("B", b)):
        if not tensor.is_floating_point():
            raise AdapterError(f"{site_path(site)} lora_{factor} is {tensor.dtype}, not a floating-point type")
    if a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise AdapterError(f"{site_path(site)}: A has rank {a.shape[0]} and B has rank {b.shape[1]}")
    return a, b


def _check_targets(config: Mapping[str, Any], factors: Factors, spec: ModelSpec) -> None:
    """The modules that the config targets are exactly those with tensors, and each name in it finds one."""
    targets = config["target_modules"]
    paths = {site: site_path(site) for site in range(spec.num_sites)}
    if isinstance(targets, list):
        for target in targets:
            if not any(_names(target, path) for path in paths.values()):
                raise AdapterError(f"target module {target!r} is none of the base's adaptable ones: {MODULES}")
    targeted = {site for site, path in paths.items() if _is_target(config, path)}
    bare, stray = sorted(targeted - set(factors)), sorted(set(factors) - targeted)
    if bare:
        raise AdapterError(f"the config targets {paths[bare[0]]} but there are no tensors for it ({len(bare)} such)")
    if stray:
        raise AdapterError(f"there are tensors for {paths[stray[0]]}, which the config does not target ({len(stray)})")


def _names(target: str, path: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _is_target(config: Mapping[str, Any], path: str) -> bool:
    """PEFT's rule: a string is a pattern for the whole path, a list holds endings, which layers may narrow."""
    excluded, targets = config.get("exclude_modules"), config["target_modules"]
    try:
        if isinstance(excluded, str) and re.fullmatch(excluded, path):
            return False
        if isinstance(excluded, list) and any(_names(name, path) for name in excluded):
            return False
        if isinstance(targets, str):
            return targets.lower() == "all-linear" or re.fullmatch(targets, path) is not None
        return any(_names(target, path) for target in targets) and _in_layers(config, path)
    except re.error as error:
        raise AdapterError(f"a pattern in the config is not a regular expression: {error}") from None


def _in_layers(config: Mapping[str, Any], path: str) -> bool:
    indices = config.get("layers_to_transform")
    if indices is None or indices == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise AdapterError(f"layers_pattern is {patterns!r}; it must be a name, or a list of names")
    forms = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    for form in forms:
        match = re.match(form, path)
        if match and match[1]:
            return int(match[1]) in (indices if isinstance(indices, list) else [indices])
    return False


def _pattern_value(config: Mapping[str, Any], key: str, path: str, default: float) -> float:
    """The first pattern that matches the end of the path, as PEFT looks it up."""
    for pattern, value in (config.get(key) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return float(value)
        except re.error as error:
            raise AdapterError(f"{key}: {pattern!r} is not a regular expression: {error}") from None
    return default


def _scale(config: Mapping[str, Any], site: int, rank: int) -> float:
    alpha = _pattern_value(config, "alpha_pattern", site_path(site), config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _check_ranks(config: Mapping[str, Any], factors: Factors, max_rank: int) -> None:
    for site, (a, _) in factors.items():
        rank = a.shape[0]
        said = int(_pattern_value(config, "rank_pattern", site_path(site), config["r"]))
        if rank != said:
            raise AdapterError(f"{site_path(site)} has rank {rank}, the config says {said}")
        if rank > max_rank:
            raise AdapterError(f"{site_path(site)} has rank {rank}, above the limit of {max_rank} (--max-lora-rank)")


def _check_values(factors: Factors, dtype: torch.dtype) -> None:
    """Name the first that is not finite in the compute type."""
    for site, pair in factors.items():
        for factor, tensor in zip("AB", pair, strict=True):
            if not _is_finite(tensor.to(dtype)):
                finite = torch.isfinite(tensor.float()).all()
                wrong = f"does not fit into {dtype}" if finite else "holds NaN or infinity"
                raise AdapterError(f"{site_path(site)} lora_{factor} {wrong}")


def _is_finite(tensor: torch.Tensor) -> bool:
    least, most = torch.aminmax(tensor)  # each is NaN where one is in between
    return math.isfinite(least) and math.isfinite(most)


def lay_out(
    identity: str, path: str, factors: Factors, scales: Mapping[int, float], dtype: torch.dtype, pin: bool
) -> Adapter:
    """All matrices, by site, in one flat tensor, aligned, so that it moves to the device in one copy."""
    entries, end = [], 0
    for site, (a, b) in factors.items():
        a_start = end
        b_start = a_start + _aligned(a.numel())
        end = b_start + _aligned(b.numel())
        entries.append(AdapterEntry(site, a_start, b_start, end, a.shape[0], scales[site]))
    flat = torch.zeros(end, dtype=dtype, pin_memory=pin)
    for entry in entries:
        a, b = factors[entry.site]
        flat[entry.a_start : entry.a_start + a.numel()] = a.reshape(-1).to(dtype)
        flat[entry.b_start : entry.b_start + b.numel()] = b.reshape(-1).to(dtype)
    return Adapter(identity, path, flat, tuple(entries))


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def site_path(site: int) -> str:
    """The module that a site number stands for."""
    return module_path(site // len(MODULES), MODULES[site % len(MODULES)])
