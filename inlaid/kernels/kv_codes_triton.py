# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
"""Codes of 8 bits for keys and values on a GPU: the parts of kernels that read scales (the attention kernels) and that
write heads (`fused_triton`). The formula is `spec.kv_codes`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def scales_of(scales, place, mask):
    """Return the scales of keys and of values of tokens of one head, in fp32 [BLOCK]; 0 outside `mask`.

    scales: int32 pointers [BLOCK] to the first token of the page of each token and head; `place`, [BLOCK], says which
    token of the page it is. A word holds two float16, the key's in its lower half. One load of four bytes brings both,
    since narrower ones cannot be pipelined."""
    word = tl.load(scales + place, mask=mask, other=0)
    k_scale = word.to(tl.int16).to(tl.float16, bitcast=True)
    v_scale = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return k_scale.to(tl.float32), v_scale.to(tl.float32)


@triton.jit
def _scale(lo, hi, LARGEST: tl.constexpr):
    """Return the scales of heads held as two halves, fp32 [HEADS, HALF_PAD], zero where there is nothing: max |x| over
    LARGEST, within float16's numbers, rounded to float16; NaN where any x is not finite. In fp32 [HEADS, 1]."""
    top = tl.maximum(tl.max(tl.abs(lo), axis=1), tl.max(tl.abs(hi), axis=1))
    finite = (tl.abs(lo) < float("inf")) & (tl.abs(hi) < float("inf"))
    nothing = tl.sum(tl.where(finite, 0.0, float("nan")), axis=1)  # 0, or NaN
    scale = tl.div_rn(top, tl.full(top.shape, LARGEST, tl.float32))
    scale = tl.minimum(tl.maximum(scale, 5.960464477539063e-08), 65504.0) + nothing
    return scale.to(tl.float16).to(tl.float32)[:, None]


@triton.jit
def _codes(x, scale, LARGEST: tl.constexpr, CODE: tl.constexpr):
    """Return the codes of x, [HEADS, HALF_PAD], for scales [HEADS, 1]: the nearest numbers of the type CODE (int8:
    halves up) of at most LARGEST."""
    ratio = tl.where(scale == scale, tl.div_rn(x, tl.broadcast_to(scale, x.shape)), 0.0)  # no scale, no codes
    if tl.int8 == CODE:
        ratio = tl.floor(ratio + 0.5)
    return tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST).to(CODE)


@triton.jit
def store_heads(lo, hi, to, half: tl.constexpr, mask, at_scale, LARGEST: tl.constexpr):
    """Write heads to `to` and `to + half`, as numbers or, with LARGEST > 0, as codes, their scales to `at_scale`.

    lo, hi: [HEADS, HALF_PAD], zero outside `mask`. to: pointers [HEADS, HALF_PAD]. at_scale: float16 pointers [HEADS,
    1]. The codes and scales are those of `spec.kv_codes`."""
    if LARGEST > 0:
        x_lo = lo.to(tl.float32)
        x_hi = hi.to(tl.float32)
        scale = _scale(x_lo, x_hi, LARGEST)
        tl.store(at_scale, scale.to(tl.float16))
        tl.store(to, _codes(x_lo, scale, LARGEST, to.dtype.element_ty), mask=mask)
        tl.store(to + half, _codes(x_hi, scale, LARGEST, to.dtype.element_ty), mask=mask)
    else:
        tl.store(to, lo, mask=mask)
        tl.store(to + half, hi, mask=mask)


def words(scales: torch.Tensor | None, unread: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return scales [blocks, G, page, 2] as the kernels read them, and the words from block to block; without scales
    something that no kernel reads."""
    if scales is None:
        return unread, 0
    found = scales.view(torch.int32)
    return found, found.stride(0)
