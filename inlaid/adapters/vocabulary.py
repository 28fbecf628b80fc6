"""An adapter's parts for the embedding and the output head, read from its tensors: LoRA factors (PEFT's
`target_modules`), rows of single tokens (`trainable_token_indices`), or a whole weight (`modules_to_save`). `peft.py`
is the only caller.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from inlaid.adapters.adapter import EMBEDDING, EMBEDDING_ROWS, HEAD, HEAD_ROWS, AdapterError, site_path
from inlaid.adapters.base import BaseLinears
from inlaid.adapters.factors import Factors, check_shape
from inlaid.adapters.peft_config import EMBED, LM_HEAD, PeftConfig
from inlaid.model.spec import ModelSpec

_NAME = re.compile(
    rf"(?:(?:base_model|model)\.)*(?P<part>{EMBED}|{LM_HEAD})\."
    r"(?:(?P<a>lora_A(?:\.[^.]+)?\.weight|lora_embedding_A(?:\.[^.]+)?)"
    r"|(?P<b>lora_B(?:\.[^.]+)?\.weight|lora_embedding_B(?:\.[^.]+)?)"
    r"|(?P<base>base_layer\.weight)"
    r"|(?P<rows>token_adapter\.trainable_tokens_delta(?:\.[^.]+)?)"
    r"|(?P<whole>(?:modules_to_save\.[^.]+\.)?weight))"
)
_WORDS = MappingProxyType({EMBED: "the whole embedding", LM_HEAD: "the whole output head"})
_SITES = MappingProxyType({EMBED: (EMBEDDING, EMBEDDING_ROWS), LM_HEAD: (HEAD, HEAD_ROWS)})
_ROUNDED = 2.0**-7  # of a weight that went through bfloat16 before it was saved


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows [n, D] for these tokens; for all where none is named."""

    tokens: tuple[int, ...]
    rows_nD: Tensor


@dataclass(frozen=True)
class VocabularyParts:
    """LoRA factors and replaced rows, by site."""

    factors: Factors = field(default_factory=dict)
    rows: dict[int, Rows] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.factors or self.rows)


def max_elements(config: PeftConfig, spec: ModelSpec, max_rank: int) -> int:
    """Return the most numbers that the parts may have, the base's own weights that PEFT saves with them included."""
    wide, tall, low_rank = spec.hidden_size, spec.vocab_size, config.low_rank()
    factors = sum((min(config.rank_of(site_path(site)), max_rank) + 1) * (wide + tall) for site in low_rank)
    whole = len(config.saved) + (2 if low_rank else 0)
    return factors + wide * (sum(map(len, config.tokens.values())) + tall * whole)


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return the tensors of linears by name, and those of the embedding and of the head by part and kind."""
    others: dict[str, Tensor] = {}
    found: dict[str, dict[str, Tensor]] = {EMBED: {}, LM_HEAD: {}}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            others[name] = tensor
            continue
        kind = next(kind for kind in ("a", "b", "base", "rows", "whole") if match[kind])
        if kind in found[match["part"]]:
            raise AdapterError(f"tensor {name}: another one claims the same place")
        if not tensor.is_floating_point():
            raise AdapterError(f"tensor {name} is {tensor.dtype}, not a floating-point type")
        found[match["part"]][kind] = tensor
    return others, found


def read(
    found: Mapping[str, dict[str, Tensor]], config: PeftConfig, spec: ModelSpec, base: BaseLinears | None
) -> VocabularyParts:
    """Return what the config says that there is, checked; AdapterError: there is more, or less, or it is not served."""
    made = VocabularyParts()
    for part, (site, rows_site) in _SITES.items():
        tensors, low_rank = dict(found[part]), site in config.low_rank()
        whole, tokens = part in config.saved, config.tokens.get(part)
        if sum((low_rank, whole, tokens is not None)) > 1:
            raise AdapterError(f"{part} is changed in two ways at once, which is not supported")
        if low_rank:
            a, b = _take(tensors, "a", part), _take(tensors, "b", part)
            made.factors[site] = check_shape(site, a, b, spec)
        elif tokens is not None:
            made.rows[rows_site] = Rows(tokens, _take(tensors, "rows", part))
        elif whole:
            made.rows[rows_site] = Rows((), _take(tensors, "whole", part))
        if "base" in tensors:
            _check_same(part, tensors.pop("base"), base)
        _refuse_rest(tensors, part)
    if EMBED in config.tokens and spec.tied and LM_HEAD not in config.tokens:
        if HEAD in made.factors or LM_HEAD in config.saved:
            raise AdapterError("the head is tied to trained tokens and changed besides, which is not supported")
        made.rows[HEAD_ROWS] = made.rows[EMBEDDING_ROWS]  # as PEFT ties it
    for site, one in made.rows.items():
        _check_rows(site, one, spec)
    if made and base is None:
        raise AdapterError(
            "it changes the embedding or the head (lm_head), which is computed for serving only; quantize without it, "
            "and serve it on the result"
        )
    return made


def _take(tensors: dict[str, Tensor], kind: str, part: str) -> Tensor:
    if kind not in tensors:
        words = {"a": "lora_A", "b": "lora_B", "rows": "trained tokens", "whole": "weight"}
        raise AdapterError(f"the config names {part} but there is no tensor of its {words[kind]}")
    return tensors.pop(kind)


def _refuse_rest(tensors: Mapping[str, Tensor], part: str) -> None:
    if "whole" in tensors:
        raise AdapterError(
            f"tensor {part}.weight: it is {_WORDS[part]}, which PEFT saves beside an adapter when the vocabulary was "
            "resized or save_embedding_layers is set; if it was not trained, save the adapter again with "
            "save_embedding_layers=False, and if it was, with modules_to_save"
        )
    if tensors:
        raise AdapterError(f"there are tensors for {part}, which the config does not target")


def _check_rows(site: int, one: Rows, spec: ModelSpec) -> None:
    count = len(one.tokens) or spec.vocab_size
    if one.rows_nD.shape != (count, spec.hidden_size):
        raise AdapterError(
            f"{site_path(site)}: rows {tuple(one.rows_nD.shape)}, where the config and the base account for "
            f"{(count, spec.hidden_size)}"
        )
    if len(set(one.tokens)) < len(one.tokens) or not all(0 <= token < spec.vocab_size for token in one.tokens):
        raise AdapterError(f"trainable_token_indices names a token twice, or one that is not below {spec.vocab_size}")
    if not bool(torch.isfinite(one.rows_nD.float()).all()):
        raise AdapterError(f"{site_path(site)}: a row holds NaN or infinity")


def _check_same(part: str, saved: Tensor, base: BaseLinears | None) -> None:
    """Refuse a base's weight that PEFT saved with the adapter and that is not this base's."""
    if base is None:
        return
    own = base.vocabulary(part)
    if saved.shape != own.shape or not torch.allclose(saved.float(), own, rtol=_ROUNDED, atol=1e-6):
        raise AdapterError(
            f"tensor {part}.base_layer.weight is not this base's weight: the adapter was trained on another one, or "
            "changed it; save the change with modules_to_save"
        )
