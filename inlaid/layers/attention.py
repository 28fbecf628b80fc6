"""Attention: projections, optional per-head norms, rotary positions, the write into paged KV, and the read back
through the attention kernel. One per transformer block.
"""

from __future__ import annotations

import torch

from inlaid.kernels.backend import HeadNorms, Kernels, LayerCache, Product, Workspace
from inlaid.kernels.context import StepContext
from inlaid.layers.linear import Linear


class Attention:
    """Grouped-query attention over the layer's KV pages; `window` limits how far back a token sees."""

    def __init__(
        self,
        qkv: Linear,
        output: Linear,
        num_heads: int,
        kernels: Kernels,
        window: int | None = None,
        head_norms: HeadNorms | None = None,
    ) -> None:
        self.qkv = qkv
        self.output = output
        self.num_heads = num_heads
        self.kernels = kernels
        self.window = window
        self.head_norms = head_norms

    def __call__(
        self,
        x_TD: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache,
        step: StepContext,
        workspace: Workspace,
    ) -> Product:
        product = self.qkv(x_TD, step, workspace)
        q_THC = self.kernels.ops.rope_store(product, angles, cache, self.num_heads, self.head_norms, step)
        mixed = self.kernels.attention.attend(q_THC, cache, self.window, step, workspace)
        return self.output(mixed, step, workspace)
