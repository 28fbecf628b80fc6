"""The transformer of every family: embedding, blocks, final norm, head.

weights.py builds it. The runners call `forward`, `hidden` and `logits`: eagerly on a CPU, captured in a graph on a GPU.
The kernels, the workspace and the step's tensors differ between devices; this code does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inlaid.kernels.backend import Kernels, Product, Workspace
from inlaid.kernels.context import StepContext
from inlaid.layers.attention import Attention
from inlaid.layers.embedding import Embedding, Head
from inlaid.layers.linear import Linear
from inlaid.layers.norm import RMSNorm
from inlaid.layers.rotary import Rotary
from inlaid.model.kv import KVCache
from inlaid.model.spec import ModelSpec

SIBLINGS = ((0, 3), (3, 4), (4, 6), (6, 7))  # of MODULES, by the linears of a block


@dataclass(frozen=True)
class Block:
    """One layer: x += attention(norm(x)); x += mlp(norm(x))."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class LastSum:
    """The two sides of the last residual sum, which the final norm adds."""

    product: Product
    residual_TD: torch.Tensor


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

    def forward(
        self, step: StepContext, cache: KVCache, workspace: Workspace, blocks: Sequence[int] | None = None
    ) -> LastSum:
        """Run the blocks over the step's tokens; write its keys and values into the cache.

        With `blocks`, run only those: the output is meaningless and serves to compile kernels."""
        ops, rotary = self.kernels.ops, self.rotary
        self.kernels.attention.plan(step, workspace)
        if self.kernels.lora is not None:
            self.kernels.lora.plan(step)
        chosen = range(len(self.blocks)) if blocks is None else blocks
        residual, x = self.embedding(step, self.blocks[chosen[0]].attention_norm, workspace)
        angles = ops.angles(rotary.cos, rotary.sin, step)
        for index, following in zip(chosen, [*chosen[1:], None], strict=True):
            block = self.blocks[index]
            x = block.mlp_norm.add(block.attention(x, angles, cache[index], step, workspace), residual, workspace)
            x = ops.activate(block.gate_up(x, step, workspace), workspace)
            product = block.down(x, step, workspace, last=following is None)
            if following is not None:
                x = self.blocks[following].attention_norm.add(product, residual, workspace)
        return LastSum(product, residual)

    def hidden(self, last: LastSum, workspace: Workspace, rows_L: torch.Tensor | None = None) -> torch.Tensor:
        """Return normalized hidden states [L, D] of the rows listed, or [T, D] of all; `last` may be read again."""
        return self.norm.of_sum(last.product, last.residual_TD, workspace, rows_L)

    def logits(self, hidden_LD: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        """Return [L, V] in the compute type."""
        return self.head(hidden_LD, workspace)
