"""Token embedding and the output head (which may share the embedding's weight). The model calls both."""

from __future__ import annotations

from typing import Any

import torch

from inlaid.kernels.backend import HeadLinear, Ops, Workspace
from inlaid.kernels.context import StepContext
from inlaid.layers.norm import RMSNorm


class Embedding:
    """Token ids to rows."""

    def __init__(self, weight_VD: torch.Tensor, ops: Ops) -> None:
        self.weight_VD = weight_VD
        self.ops = ops

    def __call__(self, step: StepContext, norm: RMSNorm, workspace: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of the step's tokens, [T, D], and their norm."""
        return self.ops.embed_norm(step, self.weight_VD, norm.weight_D, norm.eps, workspace)


class Head:
    """Hidden states to logits in the compute type. `packed` is the weight as `linear` lays it out."""

    def __init__(self, packed: Any, linear: HeadLinear) -> None:
        self.linear = linear
        self.packed = packed

    def __call__(self, hidden_LD: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        logits_LV = workspace.take("logits", hidden_LD.shape[0], self.packed.out_features)
        self.linear.gemm(hidden_LD, self.packed, logits_LV)
        return logits_LV
