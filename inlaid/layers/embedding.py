"""Token embedding and the output head (which may share the embedding's weight). The model calls both."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from inlaid.kernels.cpu import DENSE


class Embedding:
    """Token ids to rows."""

    def __init__(self, weight_VD: torch.Tensor) -> None:
        self.weight_VD = weight_VD

    def __call__(self, ids_T: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids_T, self.weight_VD)


class Head:
    """Hidden states to logits, in fp32."""

    def __init__(self, weight_VD: torch.Tensor) -> None:
        self.packed = DENSE.pack(weight_VD)

    def __call__(self, hidden_LD: torch.Tensor) -> torch.Tensor:
        logits_LV = hidden_LD.new_empty(hidden_LD.shape[0], self.packed.out_features)
        DENSE.gemm(hidden_LD, self.packed, logits_LV)
        return logits_LV.float()
