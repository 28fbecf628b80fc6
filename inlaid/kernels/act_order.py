"""Put weights that were quantized in act-order into the order of their groups, and permute x to match. The linear
backends do so once a weight, at load."""

from __future__ import annotations

from dataclasses import replace

import torch

from inlaid.checkpoint import QuantizedLinear, pack, unpack


def group_length(weight: QuantizedLinear) -> int:
    """Return the inputs of one group; all of them for whole columns."""
    return weight.in_features if weight.group_size == -1 else weight.group_size


def sequential(weight: QuantizedLinear) -> tuple[QuantizedLinear, torch.Tensor | None]:
    """Return the same function with input k in group k // length, and the int32 permutation with which it reads x.

    y = x[:, permutation] @ W. The permutation is None when the weight was in order already."""
    if not weight.spec.act_order:
        return weight, None
    g_idx, permutation = torch.sort(weight.g_idx, stable=True)
    expected = torch.arange(len(g_idx), dtype=g_idx.dtype, device=g_idx.device) // group_length(weight)
    if not torch.equal(g_idx, expected):
        raise ValueError(
            f"a weight of {len(g_idx)} inputs has groups of unequal size, which no kernel here reads; "
            "quantize it again with this project or AutoGPTQ"
        )
    codes = unpack(weight.qweight, weight.bits)[permutation]
    ordered = replace(
        weight,
        spec=replace(weight.spec, act_order=False),
        qweight=pack(codes, weight.bits),
        g_idx=g_idx.to(torch.int32),
    )
    return ordered, permutation.to(torch.int32)
