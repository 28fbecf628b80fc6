"""Other base weights for a model that runs: put where the old ones lie, or exchanged with them.

A model's blocks are walked in a fixed order and every tensor in them (packed weights, scales, permutations, norms,
biases) is named by its place. Two bases of one format have the same places, so that addresses stay what captured graphs
hold. Bases of different formats are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from inlaid.layers.attention import Attention
from inlaid.layers.linear import Linear
from inlaid.layers.norm import RMSNorm
from inlaid.model.transformer import Block, Transformer


class OtherFormat(ValueError):
    """The new base cannot take the place of the old one; the message says at which layer they differ."""


def kinds(model: Transformer) -> list[int]:
    """Return blocks that need between them every kernel that the model needs: the first of each kind, and the last."""
    firsts: dict[Any, int] = {}
    for index, block in enumerate(model.blocks):
        firsts.setdefault(kind(block), index)
    return sorted({*firsts.values(), len(model.blocks) - 1})


def kind(part: Any) -> Any:
    """Return what decides which kernels a part of the model needs: types, shapes and settings, not values."""
    if isinstance(part, torch.Tensor):
        return part.dtype, tuple(part.shape), part.stride()
    if isinstance(part, (tuple, list)):
        return tuple(map(kind, part))
    if isinstance(part, (Block, Attention, Linear, RMSNorm)) or is_dataclass(part):
        names = sorted(field.name for field in fields(part)) if is_dataclass(part) else sorted(vars(part))
        chosen = (name for name in names if name not in ("kernels", "lora", "site", "group"))
        return type(part), tuple(kind(getattr(part, name)) for name in chosen)
    return part if isinstance(part, (int, float, str, type(None))) else type(part)


def check_same(model: Transformer, layer: int, block: Block) -> None:
    """Refuse a block whose tensors are not of the types, shapes and layouts of the running one."""
    running = model.blocks[layer]
    same = kind(running) == kind(block) and len(tensors_of(running)) == len(tensors_of(block))
    if not same:
        raise OtherFormat(
            f"layer {layer} of the new base is packed in another way than the running one (bits, groups, symmetry or "
            "order of inputs differ); start a server with it instead"
        )


def tensors_of(part: Any) -> list[torch.Tensor]:
    """Return every tensor of a part of the model, each once, in a fixed order."""
    found: dict[int, torch.Tensor] = {}
    for tensor in _walk(part):
        found.setdefault(id(tensor), tensor)
    return list(found.values())


def _walk(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, (tuple, list)):
        for each in part:
            yield from _walk(each)
    elif isinstance(part, (Attention, Linear, RMSNorm)):
        for name in sorted(vars(part)):
            if name not in ("kernels", "lora", "site", "ops", "group"):
                yield from _walk(getattr(part, name))
    elif is_dataclass(part) and not isinstance(part, type):
        for each in fields(part):
            yield from _walk(getattr(part, each.name))


@torch.no_grad()
def copy_in(block: Block, tensors: Sequence[torch.Tensor]) -> None:
    """Write tensors, in the order of `tensors_of`, where a block's lie."""
    for target, source in zip(tensors_of(block), tensors, strict=True):
        target.copy_(source, non_blocking=True)


@torch.no_grad()
def exchange_contents(block: Block, other: Block) -> None:
    """Exchange what two blocks hold, so that both keep their addresses."""
    for first, second in zip(tensors_of(block), tensors_of(other), strict=True):
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)


def with_blocks(model: Transformer, blocks: list[Block]) -> Transformer:
    """Return a model of these blocks that shares everything else with `model`."""
    return Transformer(model.spec, model.kernels, model.embedding, blocks, model.norm, model.head, model.rotary)
