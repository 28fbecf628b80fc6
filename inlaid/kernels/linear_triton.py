# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
"""The backend `triton`: quantized linears of 2, 3, 4 and 8 bits, any group, act-order, on any GPU that Triton serves;
portable and deterministic. Also the permutation of x that other backends use for act-order weights.

Weights stay packed along K as on disk. For few rows K is split over programs, so that they fill the device; their
partial sums, in fp32, are added in a fixed order.

T rows, K inputs, N outputs, G groups, P partial sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from inlaid.checkpoint import QuantizedLinear, QuantSpec, unpack
from inlaid.kernels.act_order import group_length, sequential


@triton.jit
def _codes(qweight, k, n, n_mask, N: tl.constexpr, BITS: tl.constexpr):
    """Return codes [k, n] (int32) of `qweight` (int32 [K * BITS / 32, N]), a little-endian stream of bits along K.

    k and n are blocks of indices; n_mask marks the n below N. Codes of 3 bits may straddle two words."""
    bit = k * BITS
    word = bit // 32
    shift = bit % 32
    low = tl.load(qweight + word[:, None] * N + n[None, :], mask=n_mask[None, :], other=0)
    code = (low >> shift[:, None]) & ((1 << BITS) - 1)
    if BITS == 3:
        over = (shift > 29)[:, None]
        high = tl.load(qweight + (word + 1)[:, None] * N + n[None, :], mask=n_mask[None, :] & over, other=0)
        have = 32 - shift[:, None]
        kept = (1 << tl.where(over, have, 3)) - 1  # a signed shift brings in copies of the sign above these
        code = tl.where(over, (code & kept) | ((high << tl.where(over, have, 0)) & 7), code)
    return code


@triton.jit
def _gemm_kernel(
    x, x_stride, qweight, zeros, scales, permutation, out, M,
    K: tl.constexpr, N: tl.constexpr, LENGTH: tl.constexpr, BITS: tl.constexpr, ORDERED: tl.constexpr,
    P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[part] = x[:, permutation] @ W over the inputs of `part`: a run of ceil(K / P), rounded up to BLOCK_K.

    W[k, n] = scales[k // LENGTH, n] * (code[k, n] - zeros[k // LENGTH, n]), rounded to x's type; sums are in fp32.

    x: fp16 or bf16 [M, K], rows x_stride apart. qweight: int32 words of codes, see `_codes`. zeros: uint8 [G, N], true
    zeros. scales: fp16 [G, N]. permutation: int32 [K], read if ORDERED. out: [P, M, N], fp32 if P > 1, else x's type.
    LENGTH: inputs of a group. BLOCK_K divides K. Grid: (N / BLOCK_N, M / BLOCK_M, P). Where a block of K lies in one
    group, its zeros and scales are read once for the block, not once for each k."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    n_mask = n < N
    m_mask = m < M
    span: tl.constexpr = ((K + P * BLOCK_K - 1) // (P * BLOCK_K)) * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(part * span, tl.minimum(part * span + span, K), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        column = tl.load(permutation + k) if ORDERED else k
        x_MK = tl.load(x + m[:, None].to(tl.int64) * x_stride + column[None, :], mask=m_mask[:, None], other=0.0)
        code = _codes(qweight, k, n, n_mask, N, BITS)
        if LENGTH % BLOCK_K == 0:  # the whole block lies in one group
            group = k0 // LENGTH
            zero = tl.load(zeros + group * N + n, mask=n_mask, other=0).to(tl.int32)[None, :]
            scale = tl.load(scales + group * N + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        else:
            at = (k // LENGTH)[:, None] * N + n[None, :]
            zero = tl.load(zeros + at, mask=n_mask[None, :], other=0).to(tl.int32)
            scale = tl.load(scales + at, mask=n_mask[None, :], other=0.0).to(tl.float32)
        w_KN = ((code - zero).to(tl.float32) * scale).to(x_MK.dtype)
        acc = tl.dot(x_MK, w_KN, acc)
    at_out = out + (part * M + m[:, None]).to(tl.int64) * N + n[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def _sum_parts_kernel(partial, out, size, P: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = the sum of partial[p, i] over p, first to last; partial: fp32 [P, size], out: [size], any float type."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for p in tl.static_range(P):
        acc += tl.load(partial + p * size + i, mask=i < size, other=0.0)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < size)


@triton.jit
def _permute_kernel(x, x_stride, permutation, out, K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t, k] = x[t, permutation[k]]; x: [T, K], rows x_stride apart; permutation: int32 [K]; out: [T, K]."""
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = k < K
    source = tl.load(permutation + k, mask=mask, other=0)
    tl.store(out + t * K + k, tl.load(x + t * x_stride + source, mask=mask), mask=mask)


def permute_columns(x_TK: torch.Tensor, permutation_K: torch.Tensor, out_TK: torch.Tensor) -> None:
    """Write x[:, permutation] into out."""
    rows, width = x_TK.shape
    block = min(1024, triton.next_power_of_2(width))
    _permute_kernel[(rows, triton.cdiv(width, block))](
        x_TK, x_TK.stride(0), permutation_K, out_TK, K=width, BLOCK=block
    )


@dataclass(frozen=True)
class TritonPacked:
    """A weight in group order: codes as on disk, zeros unpacked, scales in fp16."""

    qweight: torch.Tensor
    zeros_GN: torch.Tensor  # uint8
    scales_GN: torch.Tensor
    permutation_K: torch.Tensor | None
    bits: int
    length: int
    in_features: int
    out_features: int


class TritonLinear:
    """x @ W with no package but Triton."""

    name = "triton"

    def __init__(self) -> None:
        self._partial: torch.Tensor | None = None

    def why_not(self, spec: QuantSpec, device: torch.device) -> str | None:
        if device.type != "cuda" and not _interpreted():
            return f"Triton's kernels need a GPU, not {device}"
        if spec.group_size != -1 and spec.group_size % 16:
            return f"its tiles need groups of a multiple of 16 inputs, not {spec.group_size}"
        return None

    def prepare(self, weight: QuantizedLinear, device: torch.device, dtype: torch.dtype) -> TritonPacked:
        weight, permutation = sequential(weight)
        return TritonPacked(
            qweight=weight.qweight.to(device).contiguous(),
            zeros_GN=unpack(weight.qzeros, weight.bits, dim=1).to(device).contiguous(),
            scales_GN=weight.scales.to(device).contiguous(),
            permutation_K=None if permutation is None else permutation.to(device),
            bits=weight.bits,
            length=group_length(weight),
            in_features=weight.in_features,
            out_features=weight.out_features,
        )

    def warmup(self, packed: TritonPacked, rows: Sequence[int]) -> None:
        """Compile the kernels for these row counts."""
        for count in rows:
            x = torch.zeros(count, packed.in_features, dtype=torch.float16, device=packed.qweight.device)
            self.gemm(x, packed, x.new_empty(count, packed.out_features))

    def gemm(self, x_TK: torch.Tensor, packed: TritonPacked, out_TN: torch.Tensor) -> None:
        """Write x @ W into out."""
        M, K, N = x_TK.shape[0], packed.in_features, packed.out_features
        block_m, block_n, parts = _tiles(M, K, N)
        block_k = _block_k(K, packed.length)
        target = out_TN
        if parts > 1:
            target = self._scratch(parts * M * N, out_TN.device)
        _gemm_kernel[(triton.cdiv(N, block_n), triton.cdiv(M, block_m), parts)](
            x_TK, x_TK.stride(0), packed.qweight, packed.zeros_GN, packed.scales_GN,
            packed.permutation_K if packed.permutation_K is not None else packed.qweight, target, M,
            K=K, N=N, LENGTH=packed.length, BITS=packed.bits, ORDERED=packed.permutation_K is not None, P=parts,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4 if block_m <= 32 else 8, num_stages=3,
        )  # fmt: skip
        if parts > 1:
            _sum_parts_kernel[(triton.cdiv(M * N, 1024),)](target, out_TN, M * N, P=parts, BLOCK=1024)

    def _scratch(self, size: int, device: torch.device) -> torch.Tensor:
        """Return room for partial sums. One buffer serves every linear of a device: they run one after another."""
        if self._partial is None or self._partial.numel() < size or self._partial.device != device:
            self._partial = torch.empty(size, dtype=torch.float32, device=device)
        return self._partial


def _tiles(M: int, K: int, N: int) -> tuple[int, int, int]:
    """Return rows and columns of a tile and parts of K that give enough programs to fill a chip, whatever M is."""
    if M > 32:
        return (64, 128, 1) if M > 64 else (64, 64, 1)
    block_m, block_n = (16 if M <= 16 else 32), 64
    parts = 1
    while parts < 8 and parts * triton.cdiv(N, block_n) < 264 and K // (2 * parts) >= 512:
        parts *= 2
    return block_m, block_n, parts


def _block_k(K: int, length: int) -> int:
    """Return the largest block of K, a power of two that divides K and lies in one group where groups allow it."""
    block = 64
    while K % block or (length % block and block > 32):
        block //= 2
    return max(16, block)


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)
