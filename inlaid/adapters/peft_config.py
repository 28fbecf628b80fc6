"""An adapter's `adapter_config.json`, checked: which linears it targets, with which rank and which scale. `peft.py` is
the only caller. A setting that would change the result and is not computed here is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inlaid.adapters.adapter import EMBEDDING, HEAD, AdapterError, site_path
from inlaid.adapters.base import RESIDUAL_INITS
from inlaid.adapters.pattern import Effort, Pattern, PatternError
from inlaid.kernels.backend import MODULES

# Settings that change nothing about a trained adapter's result, or that are read below.
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "loftq_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "alpha_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "bias", "use_dora",
    "lora_bias", "modules_to_save", "trainable_token_indices",
})  # fmt: skip
_REASONS = (
    ("fan_in_fan_out", "fan_in_fan_out is for Conv1D layers, which the base does not have"),
    ("layer_replication", "layer_replication changes the base and is not supported"),
    ("alora_invocation_tokens", "activated LoRA (alora_invocation_tokens) is not supported"),
    ("target_parameters", "target_parameters is not supported; only linear modules are adapted"),
)
EMBED, LM_HEAD = "embed_tokens", "lm_head"
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base weights too
_INITS = (*_PLAIN_INITS, *RESIDUAL_INITS)


@dataclass(frozen=True)
class PeftConfig:
    """The linears that an adapter changes, and by how much."""

    rank: int
    alpha: float
    rslora: bool
    targets: Pattern | frozenset[str] | None  # a pattern for the whole path, or endings of it; None: every linear
    excluded: Pattern | frozenset[str]
    layers: frozenset[int] | None  # None: all
    layer_lists: frozenset[str]  # names of the lists of layers that `layers` counts in; empty: any
    rank_patterns: tuple[tuple[Pattern, float], ...]
    alpha_patterns: tuple[tuple[Pattern, float], ...]
    dora: bool = False
    lora_bias: bool = False
    residual_init: str | None = None  # what was taken out of the base when training began
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # trained ones, of EMBED and LM_HEAD
    saved: frozenset[str] = frozenset()  # of EMBED and LM_HEAD, those saved whole

    def low_rank(self) -> tuple[int, ...]:
        """Return the sites of the embedding and the head that have LoRA factors. "all-linear" leaves both out."""
        sites = () if self.targets is None else (EMBEDDING, HEAD)
        return tuple(site for site in sites if self.is_target(site_path(site)))

    def is_target(self, path: str) -> bool:
        """Apply PEFT's rule: a string is a pattern for the whole path, a list holds endings, which layers narrow."""
        try:
            if _selects(self.excluded, path):
                return False
            if self.targets is None:
                return True
            return _selects(self.targets, path) and (isinstance(self.targets, Pattern) or self._is_in_layers(path))
        except PatternError as error:
            raise AdapterError(f"a pattern in the config cannot be used: {error}") from None

    def rank_of(self, path: str) -> int:
        return int(_value_of(self.rank_patterns, "rank_pattern", path, self.rank))

    def scale_of(self, path: str, rank: int) -> float:
        alpha = _value_of(self.alpha_patterns, "alpha_pattern", path, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def _is_in_layers(self, path: str) -> bool:
        if self.layers is None:
            return True
        found = re.match(r"(.*?)\.(\d+)\.", path)
        if found is None or int(found[2]) not in self.layers:
            return False
        return not self.layer_lists or not self.layer_lists.isdisjoint(_endings(found[1]))


def _selects(wanted: Pattern | frozenset[str], path: str) -> bool:
    if isinstance(wanted, Pattern):
        return wanted.full_match(path)
    return not wanted.isdisjoint(_endings(path))


def _endings(path: str) -> list[str]:
    """Return a path and all that follows one of its dots."""
    names = path.split(".")
    return [".".join(names[start:]) for start in range(len(names))]


def _value_of(patterns: tuple[tuple[Pattern, float], ...], key: str, path: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of the path, as PEFT looks it up."""
    try:
        return next((value for pattern, value in patterns if pattern.match_ending(path)), default)
    except PatternError as error:
        raise AdapterError(f"{key}: {error}") from None


def parse_config(data: bytes) -> PeftConfig:
    """Read and check a config; AdapterError says what is wrong with it."""
    config = _settings(data)
    effort = Effort()
    layers = config.get("layers_to_transform")
    return PeftConfig(
        rank=_rank(config),
        alpha=_number(config.get("lora_alpha"), "lora_alpha"),
        rslora=bool(config.get("use_rslora")),
        targets=_targets(config, effort),
        excluded=_excluded(config, effort),
        layers=None if layers is None or layers == [] else _layers(layers),
        layer_lists=_layer_lists(config),
        rank_patterns=_patterns(config, "rank_pattern", effort),
        alpha_patterns=_patterns(config, "alpha_pattern", effort),
        dora=bool(config.get("use_dora")),
        lora_bias=bool(config.get("lora_bias")),
        residual_init=init if (init := config.get("init_lora_weights")) in RESIDUAL_INITS else None,
        tokens=_tokens(config),
        saved=_saved(config),
    )


def check_targets(config: PeftConfig, targeted: set[int], adapted: set[int], paths: Mapping[int, str]) -> None:
    """Refuse an adapter whose config targets other linears than its tensors are for, or names a module for nothing."""
    if isinstance(config.targets, frozenset):
        unknown = config.targets.difference(*map(_endings, paths.values()))
        if unknown:
            raise AdapterError(f"target module {_shown(min(unknown))} is none of the base's adaptable ones: {MODULES}")
    bare, stray = sorted(targeted - adapted), sorted(adapted - targeted)
    if bare:
        raise AdapterError(f"the config targets {paths[bare[0]]} but there are no tensors for it ({len(bare)} such)")
    if stray:
        raise AdapterError(f"there are tensors for {paths[stray[0]]}, which the config does not target ({len(stray)})")


def _tokens(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the trained tokens by part of the vocabulary; a plain list is of the embedding."""
    given = config.get("trainable_token_indices") or {}
    by_name = {EMBED: given} if isinstance(given, list) else given
    found: dict[str, tuple[int, ...]] = {}
    for name, tokens in by_name.items() if isinstance(by_name, dict) else [("", None)]:
        part = str(name).removeprefix("model.")
        whole = isinstance(tokens, list) and all(type(token) is int for token in tokens)
        if part not in (EMBED, LM_HEAD) or not whole or not tokens:
            raise AdapterError(
                f"trainable_token_indices {_shown(given)} is not supported; give a list of tokens, or one each for "
                f"{EMBED} and {LM_HEAD}"
            )
        found[part] = tuple(tokens)
    return found


def _saved(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the parts of the vocabulary that are saved whole. Other modules are refused."""
    given = config.get("modules_to_save") or []
    names = given if isinstance(given, list) else [given]
    parts = {str(name).removeprefix("model.") for name in names}
    if others := sorted(parts - {EMBED, LM_HEAD}):
        raise AdapterError(
            f"modules_to_save {_shown(others[0])} is not supported: whole copies of {EMBED} and {LM_HEAD} are served, "
            "and every other layer is shared by all rows of a step"
        )
    if parts and config.get("ensure_weight_tying"):
        raise AdapterError("modules_to_save with ensure_weight_tying is not supported; save both layers apart")
    return frozenset(parts)


def _settings(data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"adapter_config.json is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError("adapter_config.json does not hold an object")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type {_shown(config.get('peft_type'))} is not supported; supported: LORA")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"bias {_shown(config['bias'])} is not supported; only none")
    for key, value in config.items():
        if key not in _HARMLESS and value not in (None, False, [], {}):
            raise AdapterError(dict(_REASONS).get(key, f"setting {key} = {_shown(value)} is not supported"))
    if config.get("use_dora") and (config.get("lora_bias") or config.get("init_lora_weights") in RESIDUAL_INITS):
        raise AdapterError("DoRA with lora_bias, or begun as PiSSA or OLoRA, is not supported")
    if config.get("init_lora_weights", True) not in _INITS:
        raise AdapterError(
            f"init_lora_weights {_shown(config['init_lora_weights'])} changes the base weights; "
            "convert it to a plain LoRA (PEFT's path_initial_model_for_weight_conversion) and save it again"
        )
    return config


def _shown(value: Any) -> str:
    """Return a value from the file as a message shows it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _rank(config: Mapping[str, Any]) -> int:
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise AdapterError(f"r must be a whole number above 0, not {_shown(rank)}")
    return rank


def _number(value: Any, name: str) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise AdapterError(f"{name} must be a number, and finite, not {_shown(value)}")
    return number


def _targets(config: Mapping[str, Any], effort: Effort) -> Pattern | frozenset[str] | None:
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return None if targets.lower() == "all-linear" else _pattern(targets, "target_modules", effort)
    if isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets):
        return frozenset(targets)
    raise AdapterError(f"target_modules must be a list of names or a pattern, not {_shown(targets)}")


def _excluded(config: Mapping[str, Any], effort: Effort) -> Pattern | frozenset[str]:
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        return _pattern(excluded, "exclude_modules", effort)
    if isinstance(excluded, list) and all(isinstance(name, str) for name in excluded):
        return frozenset(excluded)
    raise AdapterError(f"exclude_modules must be a list of names or a pattern, not {_shown(excluded)}")


def _layers(indices: Any) -> frozenset[int]:
    chosen = indices if isinstance(indices, list) else [indices]
    if not all(type(index) is int for index in chosen):
        raise AdapterError(f"layers_to_transform must be a layer or a list of layers, not {_shown(indices)}")
    return frozenset(chosen)


def _layer_lists(config: Mapping[str, Any]) -> frozenset[str]:
    names = config.get("layers_pattern") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"layers_pattern is {_shown(names)}; it must be a name, or a list of names")
    for name in names:
        if re.fullmatch(r"\w+(\.\w+)*", name) is None:
            raise AdapterError(f"layers_pattern {_shown(name)} is not supported; give a name such as 'layers'")
    return frozenset(names)


def _patterns(config: Mapping[str, Any], key: str, effort: Effort) -> tuple[tuple[Pattern, float], ...]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{key} must map patterns to numbers, not be {_shown(patterns)}")
    found = []
    for text, value in patterns.items():
        number = _number(value, f"{key}: the value of {_shown(text)}")
        if key == "rank_pattern" and (number < 1 or not number.is_integer()):
            raise AdapterError(f"{key}: a rank is a whole number above 0, not {_shown(value)}")
        found.append((_pattern(text, key, effort), number))
    return tuple(found)


def _pattern(text: str, key: str, effort: Effort) -> Pattern:
    try:
        return Pattern(text, effort)
    except PatternError as error:
        raise AdapterError(f"{key}: {_shown(text)} is not a regular expression that is supported: {error}") from None
