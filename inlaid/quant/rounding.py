"""Rounding a block of inputs one after the other, each error moved to those not yet rounded: the part that GPTQ's pass
and its refinement share, and the only loop over single inputs. On a GPU it is one kernel.

Legend: N outputs, B inputs of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from inlaid.quant.grid import nearest_codes

# target, spread, scale, zero, codes (written), origin -> errors
RoundBlock = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def round_block(
    target_BN: Tensor,
    spread_BB: Tensor,
    scale_BN: Tensor,
    zero_BN: Tensor,
    codes_BN: Tensor,
    origin_BN: Tensor,
    max_code: int,
) -> Tensor:
    """Round each row of `target_BN` when its turn comes, and take spread[i, j] times its error from every later row j.

    Errors are measured from `origin_BN`: the target itself in GPTQ, the weight when codes are refined. Returns them;
    writes `codes_BN`, and uses `target_BN` up.
    """
    errors_BN = torch.empty_like(target_BN)
    rows = zip(target_BN, scale_BN, zero_BN, codes_BN, origin_BN, errors_BN, spread_BB, strict=True)
    for i, (target_N, scale_N, zero_N, code_N, origin_N, error_N, spread_B) in enumerate(rows, 1):
        value_N = nearest_codes(target_N, scale_N, zero_N, max_code)
        code_N.copy_(value_N)
        torch.sub(origin_N, value_N.sub_(zero_N).mul_(scale_N), out=error_N)
        target_BN[i:].addr_(spread_B[i:], error_N, alpha=-1)
    return errors_BN


def rounder(like_BN: Tensor, max_code: int) -> RoundBlock:
    """Return `round_block` for blocks on this one's device: a thousand tiny kernels would cost more to launch than to
    run."""
    if like_BN.is_cuda and like_BN.dtype == torch.float32:
        from inlaid.kernels import rounding_triton  # only here: a machine without a GPU has no Triton

        return partial(rounding_triton.round_block, max_code=max_code)
    return partial(round_block, max_code=max_code)
