"""Fixed buffers for the largest step, so that a captured step allocates nothing. One per `DeviceStep`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch

from inlaid.kernels import attention_triton, lora_triton
from inlaid.layers.linear import PARTS_ROWS
from inlaid.model.transformer import Block, Transformer
from inlaid.runner.base_weights import kinds

MOST_VIEWS = 4096  # of steps that no graph replays


class FixedMemory:
    """A Workspace of one buffer for each name, all zero at first: what padding reads must be finite."""

    def __init__(self, sizes: Mapping[str, tuple[int, torch.dtype]], device: torch.device) -> None:
        """Allocate, by name, elements and type."""
        self._buffers = {name: torch.zeros(size, dtype=dtype, device=device) for name, (size, dtype) in sizes.items()}
        self._views: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.side: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        view = self._views.get((name, shape))
        if view is None:
            buffer = self._buffers[name]
            assert dtype is None or dtype == buffer.dtype
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            view = self._views[name, shape] = buffer[: prod(shape)].view(shape)
        return view

    def fits(self, name: str, size: int) -> bool:
        return size <= self.room(name)

    def room(self, name: str) -> int:
        """Return the elements of a buffer."""
        return self._buffers[name].numel()


def fixed_memory(
    model: Transformer,
    max_tokens: int,
    max_rows: int,
    max_blocks: int,
    max_rank: int,
    device: torch.device,
    dtype: torch.dtype,
    max_queries: int = 1,
) -> FixedMemory:
    """Return the buffers of a model for steps of up to `max_tokens` tokens and `max_rows` sequences of up to
    `max_blocks` KV blocks, with adapters of up to `max_rank`. Steps with drafts have up to `max_queries` tokens of
    each."""
    spec = model.spec
    q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    splits = max(
        min(rows * max_queries, max(rows, max_tokens)) * attention_triton.num_splits(rows, spec.num_kv_heads)
        for rows in range(1, max_rows + 1)
    )
    sizes = {
        "residual": max_tokens * spec.hidden_size,
        "normed": max_tokens * spec.hidden_size,
        "rope": max_tokens * (q_width + 2 * kv_width),
        "mixed": max_tokens * q_width,
        "norm": max_tokens * spec.hidden_size,
        "parts": _most_parts(model, max_tokens) * spec.hidden_size,
        "activation": max_tokens * 2 * spec.intermediate_size,
        "activated": max_tokens * spec.intermediate_size,
        "hidden": max_rows * spec.hidden_size,
        "logits": max_rows * spec.vocab_size,
    }
    others = {
        "block_tables": (2 * max_rows * max_blocks, torch.int32),
        "attention_sums": (splits * spec.num_heads * spec.head_dim, torch.float32),
        "attention_stats": (splits * spec.num_heads * 2, torch.float32),
        "shrunk": (_shrunk_size(max_tokens, max_rank), torch.float32),
    }
    return FixedMemory({name: (size, dtype) for name, size in sizes.items()} | others, device)


def _most_parts(model: Transformer, max_tokens: int) -> int:
    """Return the most rows, of all parts together, that a product before a norm may have."""
    rows = range(1, min(PARTS_ROWS, max_tokens) + 1)
    blocks: Sequence[Block] = [model.blocks[index] for index in kinds(model)]
    linears = [linear for block in blocks for linear in (block.attention.output, block.down)]
    found = ((count, linear.split(count)) for linear in linears for count in rows)
    return max((count * parts.most for count, parts in found if parts is not None), default=0)


def _shrunk_size(max_tokens: int, max_rank: int) -> int:
    """Return the elements of the largest partial sums of a shrink."""
    rows = (min(8, max_tokens), min(256, max_tokens), max_tokens)
    parts = [lora_triton.tuning_for(count, lora_triton.block_rows_for(count), max_rank).parts for count in rows]
    return max(3 * p * count * lora_triton.rank_stride(max_rank) for p, count in zip(parts, rows, strict=True))
