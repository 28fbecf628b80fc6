# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
"""GPTQ's loop over the inputs of a block as one kernel: `quant.rounding.round_block` on a GPU. Outputs do not depend on
each other, so each program takes some columns through all rows, which it holds in registers.

B inputs of one block, N outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 16  # columns of a program


@triton.jit
def _round_block_kernel(
    target, target_stride, spread, spread_stride, scale, scale_stride, zero, zero_stride, codes, codes_stride,
    origin, origin_stride, errors, N, max_code,
    B: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, FROM_TARGET: tl.constexpr,
):  # fmt: skip
    """For i = 0 … B - 1, with t = target[i] as the rows before it have left it:
    codes[i] = clamp(round(t / scale[i]) + zero[i], 0, max_code), half to even;
    errors[i] = origin[i] - (codes[i] - zero[i]) * scale[i], where FROM_TARGET has t in the place of origin[i];
    target[j] -= spread[i, j] * errors[i] for all j > i, in registers only.

    target, scale, zero, origin: fp32 [B, N], rows `_stride` apart (0: one row for all). spread: fp32 [B, B].
    codes: uint8 [B, N] and errors: fp32 [B, N] are written. ROWS: B rounded up to a power of two. Grid: N / TILE.
    Adding and taking away 1.5 * 2^23 rounds half to even where |t / scale| < 2^22; codes of larger ones are clamped."""
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    r = tl.arange(0, ROWS)
    inside = n < N
    held = tl.load(target + r[:, None] * target_stride + n[None, :], mask=(r < B)[:, None] & inside[None, :], other=0.0)
    for i in range(B):
        t = tl.sum(tl.where(r[:, None] == i, held, 0.0), axis=0)
        s = tl.load(scale + i * scale_stride + n, mask=inside, other=1.0)
        z = tl.load(zero + i * zero_stride + n, mask=inside, other=0.0)
        code = (tl.math.div_rn(t, s) + 12582912.0) - 12582912.0 + z
        code = tl.minimum(tl.maximum(code, 0.0), max_code)
        if FROM_TARGET:
            start = t
        else:
            start = tl.load(origin + i * origin_stride + n, mask=inside, other=0.0)
        error = start - (code - z) * s
        tl.store(codes + i * codes_stride + n, code.to(tl.uint8), mask=inside)
        tl.store(errors + i * N + n, error, mask=inside)
        spread_R = tl.load(spread + i * spread_stride + r, mask=(r > i) & (r < B), other=0.0)
        held -= spread_R[:, None] * error[None, :]


def round_block(
    target_BN: torch.Tensor,
    spread_BB: torch.Tensor,
    scale_BN: torch.Tensor,
    zero_BN: torch.Tensor,
    codes_BN: torch.Tensor,
    origin_BN: torch.Tensor,
    max_code: int,
) -> torch.Tensor:
    """Round a block's rows in turn and return the errors; writes `codes_BN`, and leaves `target_BN` as it is."""
    rows, width = target_BN.shape
    from_target = origin_BN is target_BN
    target_BN, spread_BB, scale_BN, zero_BN, origin_BN = (
        each if each.stride(1) == 1 else each.contiguous()
        for each in (target_BN, spread_BB, scale_BN, zero_BN, origin_BN)
    )
    assert codes_BN.stride(1) == 1
    errors_BN = torch.empty(rows, width, dtype=target_BN.dtype, device=target_BN.device)
    arguments = (target_BN, spread_BB, scale_BN, zero_BN, codes_BN, origin_BN)
    with_strides = [part for each in arguments for part in (each, each.stride(0))]
    _round_block_kernel[(triton.cdiv(width, TILE),)](
        *with_strides, errors_BN, width, float(max_code),
        B=rows, ROWS=triton.next_power_of_2(rows), TILE=TILE, FROM_TARGET=from_target, num_warps=2,
    )  # fmt: skip
    return errors_BN
