"""RMSNorm, fused with the residual sum before it. The transformer calls it."""

from __future__ import annotations

import torch

from inlaid.kernels.backend import Ops, Product, Workspace


class RMSNorm:
    """Normalizes the last dimension by its root mean square."""

    def __init__(self, weight_D: torch.Tensor, eps: float, ops: Ops) -> None:
        self.weight_D = weight_D
        self.eps = eps
        self.ops = ops

    def add(self, product: Product, residual_TD: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        """Add the product to the residual in place; return the norm of the sum."""
        return self.ops.add_norm(product, residual_TD, self.weight_D, self.eps, workspace)

    def of_sum(
        self, product: Product, residual_TD: torch.Tensor, workspace: Workspace, rows_L: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the norm of residual + product, of the rows listed or of all; change neither."""
        return self.ops.add_norm(product, residual_TD, self.weight_D, self.eps, workspace, rows_L, keep=False)
