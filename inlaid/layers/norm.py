"""RMSNorm, alone or fused with the residual sum. The model's blocks call it."""

from __future__ import annotations

import torch

from inlaid.kernels.backend import Ops


class RMSNorm:
    """Normalizes the last dimension by its root mean square."""

    def __init__(self, weight: torch.Tensor, eps: float, ops: Ops) -> None:
        self.weight = weight
        self.eps = eps
        self.ops = ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual += x in place; the norm of the sum."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)
