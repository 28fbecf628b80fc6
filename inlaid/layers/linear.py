"""A linear layer: base weights (dense or quantized, siblings fused where they can be), bias, and the adapters of each
row, in one forward. The model builds it; the kernels compute it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from inlaid.kernels.backend import Gemm, LoraBackend, Site
from inlaid.kernels.context import StepContext


class Linear:
    """out = x @ W.T + bias + adapters. `parts` are (backend, packed weight), side by side in the output: one when
    the siblings are fused, several when they could not be (different act-order permutations)."""

    def __init__(
        self,
        parts: Sequence[tuple[Gemm, Any]],
        bias_N: torch.Tensor | None = None,
        site: Site | None = None,
        lora: LoraBackend | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self.bias_N = bias_N
        self.site = site
        self.lora = lora if site is not None else None
        self.in_features: int = self.parts[0][1].in_features
        self.out_features: int = sum(packed.out_features for _, packed in self.parts)

    def __call__(self, x_TK: torch.Tensor, context: StepContext) -> torch.Tensor:
        out_TN = x_TK.new_empty(x_TK.shape[0], self.out_features)
        adapted = self.lora is not None and context.has_adapters
        if adapted:
            shrunk = self.lora.shrink(x_TK, self.site, context)  # type: ignore[union-attr, arg-type]
        self._base(x_TK, out_TN)
        if self.bias_N is not None:
            out_TN += self.bias_N
        if adapted:
            self.lora.expand(shrunk, self.site, out_TN, context)  # type: ignore[union-attr, arg-type]
        return out_TN

    def _base(self, x_TK: torch.Tensor, out_TN: torch.Tensor) -> None:
        if len(self.parts) == 1:
            backend, packed = self.parts[0]
            backend.gemm(x_TK, packed, out_TN)
            return
        start = 0
        for backend, packed in self.parts:  # gemm writes contiguous memory, so each part gets its own
            part_TN = out_TN.new_empty(x_TK.shape[0], packed.out_features)
            backend.gemm(x_TK, packed, part_TN)
            out_TN[:, start : start + packed.out_features].copy_(part_TN)
            start += packed.out_features
