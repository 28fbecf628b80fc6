"""Token embedding and the output head (which may share the embedding's weight). The model calls both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from inlaid.kernels.backend import HeadLinear, Ops, Product, Workspace
from inlaid.kernels.context import StepContext
from inlaid.kernels.cpu import rms_norm
from inlaid.kernels.group import Group
from inlaid.kernels.vocabulary import tokens_of
from inlaid.layers.norm import RMSNorm


class Embedding:
    """Token ids to rows. With a `group` each member has as many rows of the vocabulary, in the members' order."""

    def __init__(self, weight_VD: torch.Tensor, ops: Ops, group: Group | None = None) -> None:
        self.weight_VD = weight_VD
        self.ops = ops
        self.group = group

    def __call__(self, step: StepContext, norm: RMSNorm, workspace: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of the step's tokens, [T, D], and their norm."""
        if self.group is not None:
            rows_TD = self._rows(step, norm.weight_D.dtype, self.group)
            zeros_TD = torch.zeros_like(rows_TD)
            return zeros_TD, norm.add(Product(rows_TD), zeros_TD, workspace)
        residual_TD, normed_TD = self.ops.embed_norm(step, self.weight_VD, norm.weight_D, norm.eps, workspace)
        if step.vocabulary is not None:
            step.vocabulary.embed(step, residual_TD)
            normed_TD.copy_(rms_norm(residual_TD, norm.weight_D, norm.eps))
        return residual_TD, normed_TD

    def _rows(self, step: StepContext, dtype: torch.dtype, group: Group) -> torch.Tensor:
        """Return the rows of the step's tokens, each of which one member has."""
        places_T = tokens_of(step) - group.index * len(self.weight_VD)
        own_T = (places_T >= 0) & (places_T < len(self.weight_VD))
        rows_TD = F.embedding(places_T.masked_fill(~own_T, 0), self.weight_VD).to(dtype)
        rows_TD = rows_TD.masked_fill(~own_T[:, None], 0)
        group.sum(rows_TD)
        return rows_TD


class Head:
    """Hidden states to logits in the compute type. `packed` is the weight as `linear` lays it out; with a `group` it is
    a member's rows of a vocabulary of `vocab_size` tokens."""

    def __init__(self, packed: Any, linear: HeadLinear, group: Group | None = None, vocab_size: int = 0) -> None:
        self.linear = linear
        self.packed = packed
        self.group, self._vocab_size = group, vocab_size

    def __call__(self, hidden_LD: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        logits_LV = workspace.take("logits", hidden_LD.shape[0], self.packed.out_features)
        self.linear.gemm(hidden_LD, self.packed, logits_LV)
        return logits_LV if self.group is None else self.group.gather(logits_LV)[:, : self._vocab_size]
