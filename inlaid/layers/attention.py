"""Attention: projections, optional per-head norms, rotary positions, the write into paged KV, and the read back
through the attention kernel. One per transformer block.
"""

from __future__ import annotations

import torch

from inlaid.kernels.backend import Kernels
from inlaid.kernels.context import StepContext
from inlaid.layers.linear import Linear
from inlaid.layers.norm import RMSNorm


class Attention:
    """Grouped-query attention over the layer's KV pages; `window` limits how far back a token sees."""

    def __init__(
        self,
        qkv: Linear,
        output: Linear,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kernels: Kernels,
        window: int | None = None,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        self.qkv = qkv
        self.output = output
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.kernels = kernels
        self.window = window
        self.q_norm = q_norm
        self.k_norm = k_norm

    def __call__(
        self,
        x_TD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[torch.Tensor, torch.Tensor],
        context: StepContext,
    ) -> torch.Tensor:
        H, G = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x_TD, context).view(x_TD.shape[0], H + 2 * G, self.head_dim)
        qk, v = qkv[:, : H + G], qkv[:, H + G :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :H]), self.k_norm(qk[:, H:])), dim=1)
        self.kernels.ops.rotate(qk, *rotation)
        self.kernels.ops.store_kv(qk[:, H:], v, *cache, context.kv_slots_T)
        mixed = self.kernels.attention.attend(qk[:, :H], *cache, self.window, context)
        return self.output(mixed.reshape(x_TD.shape[0], H * self.head_dim), context)
