"""The transformer, once, for every family: embedding, blocks, final norm, head. weights.py builds it; the runner
calls forward and logits. All that differs between a CPU and a GPU is inside the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inlaid.kernels.backend import Kernels
from inlaid.kernels.context import StepContext
from inlaid.layers.attention import Attention
from inlaid.layers.embedding import Embedding, Head
from inlaid.layers.linear import Linear
from inlaid.layers.norm import RMSNorm
from inlaid.layers.rotary import Rotary
from inlaid.model.spec import ModelSpec

KVCache = list[tuple[torch.Tensor, torch.Tensor]]  # per layer: k and v, [blocks, block_size, kv heads, head width]


@dataclass(frozen=True)
class Block:
    """One layer: x += attention(norm(x)); x += mlp(norm(x))."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    gate_up: Linear
    down: Linear


class Transformer:
    """Token ids to hidden states to logits."""

    def __init__(
        self,
        spec: ModelSpec,
        kernels: Kernels,
        embedding: Embedding,
        blocks: list[Block],
        norm: RMSNorm,
        head: Head,
        rotary: Rotary,
    ) -> None:
        self.spec = spec
        self.kernels = kernels
        self.embedding = embedding
        self.blocks = blocks
        self.norm = norm
        self.head = head
        self.rotary = rotary

    def plan(self, context: StepContext) -> None:
        """What the kernels derive from a step before its layers run."""
        self.kernels.attention.plan(context)
        if self.kernels.lora is not None:
            self.kernels.lora.plan(context)

    def forward(self, ids_T: torch.Tensor, cache: KVCache, context: StepContext) -> torch.Tensor:
        """Normalized hidden states [T, D]; writes this step's keys and values into the cache."""
        residual = self.embedding(ids_T)
        rotation = self.rotary.lookup(context.positions_T)
        x = None
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            h = block.attention_norm(residual) if x is None else block.attention_norm.add(x, residual)
            h = block.attention(h, rotation, layer_cache, context)
            h = block.mlp_norm.add(h, residual)
            x = block.down(self.kernels.ops.silu_mul(block.gate_up(h, context)), context)
        assert x is not None
        return self.norm.add(x, residual)

    def logits(self, hidden_TD: torch.Tensor, rows_L: torch.Tensor) -> torch.Tensor:
        """[L, V] in fp32, for the rows asked for."""
        return self.head(hidden_TD.index_select(0, rows_L))


def new_cache(spec: ModelSpec, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype) -> KVCache:
    """Zeroed pages for every layer: what a padded read touches must be finite."""
    shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
    return [
        (torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
        for _ in range(spec.num_layers)
    ]


def block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers."""
    return 2 * spec.num_layers * block_size * spec.num_kv_heads * spec.head_dim * dtype.itemsize
