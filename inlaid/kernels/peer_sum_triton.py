# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
"""The sum of a product over the GPUs of one host, joined with the residual sum and the norm that follow.

It is one launch in the place of an all-reduce and a norm. It is one shot: each GPU reads the others' products whole,
through peer pointers. Not measured yet, and no runner calls it: groups of GPUs are still refused.

Shapes: N members, T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from inlaid.kernels.fused_triton import _normalized


@triton.jit
def _peer_sum_norm_kernel(
    inputs, flags, epochs, residual, weight, out, eps, member,
    D: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """residual[t] += x_0[t] + ... + x_{N-1}[t]; out[t] = rms_norm(residual[t]) * weight. Grid: (T,), a program for
    each token.

    inputs: int64 [N], the addresses of the members' products x_j, each [T, D] of the weight's type, contiguous.
    flags: int64 [N], the addresses of the members' flags, each int32 [T, N]. epochs: int32 [T], this member's own,
    the launches in which a token took part. member: this member's number. residual, out: [T, D]. weight: [D].
    BLOCK: a power of two, at least D. COUNT: N.

    A program writes its epoch into its place of each member's flags, then waits until all members have written theirs
    for this token into its own. Products were written by kernels before this one, so the release makes them visible.
    Epochs are counted on the device, so that a captured launch may be replayed. The product is added in the order of
    the members in fp32 and rounded once: the same bits on all members. A product's buffer may be written again by the
    second launch after this one: then all members have begun the one between.

    Programs of later tokens need no place for those of earlier ones to end, so any number of tokens makes progress."""
    t = tl.program_id(0).to(tl.int64)
    epoch = tl.load(epochs + t) + 1
    for j in tl.static_range(COUNT):
        theirs = tl.load(flags + j).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(theirs + t * COUNT + member, epoch, sem="release", scope="sys")
    own = tl.load(flags + member).to(tl.pointer_type(tl.int32))
    for j in tl.static_range(COUNT):
        while tl.atomic_add(own + t * COUNT + j, 0, sem="acquire", scope="sys") < epoch:
            pass
    tl.store(epochs + t, epoch)
    d = tl.arange(0, BLOCK)
    mask = d < D
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(COUNT):
        x = tl.load(inputs + j).to(tl.pointer_type(weight.dtype.element_ty))
        total += tl.load(x + t * D + d, mask=mask, other=0.0).to(tl.float32)
    value = total.to(weight.dtype.element_ty)
    before = tl.load(residual + t * D + d, mask=mask, other=0.0)
    value = (before.to(tl.float32) + value.to(tl.float32)).to(value.dtype)
    tl.store(residual + t * D + d, value, mask=mask)
    y = _normalized(value.to(tl.float32), weight, D, eps, d, mask)
    tl.store(out + t * D + d, y.to(value.dtype), mask=mask)


@dataclass(frozen=True)
class PeerMemory:
    """The members' products and flags as one member reaches them. `inputs` and `flags` are int64 [N] addresses on the
    device, `epochs` int32 [T] of its own."""

    member: int
    inputs: torch.Tensor
    flags: torch.Tensor
    epochs: torch.Tensor


def peer_sum_norm(
    memory: PeerMemory, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, out_TD: torch.Tensor
) -> None:
    """Add the members' products to the residual; write its norm into out."""
    tokens, width = residual_TD.shape
    _peer_sum_norm_kernel[(tokens,)](
        memory.inputs, memory.flags, memory.epochs, residual_TD, weight_D, out_TD, eps, memory.member, width,
        triton.next_power_of_2(width), len(memory.inputs), num_warps=8 if width >= 2048 else 4,
    )  # fmt: skip
