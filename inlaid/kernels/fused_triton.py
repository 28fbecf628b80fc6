# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
"""The operations between the linears on a GPU, one launch each: embedding and norm, residual sum and norm, rotation and
write into paged KV, activation. `TritonOps` is what the transformer calls.

An operation that reads the product of an adapted linear can add the adapters' expansion on the way, row by row
(`pending`, see lora_triton.py). Values are rounded to the compute type where cpu.py rounds them, so that greedy tokens
agree.

Kernels that may launch early (`EARLY`, see early.py) wait for the kernels before them first of all. Arguments that
several kernels share:
  partial, partial_stride, pool, table, scale, adapters, num_sites, site, GROUPS, P, R_STRIDE, BLOCK_R
      the pending expansion, as `pending_part` reads it; P is 0 when nothing is pending, and none of them is read.

Shapes: T tokens, D model width, F MLP width, H query heads, G key/value heads, C head width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from inlaid.kernels.backend import HeadNorms, LayerCache, Parts, Product, Workspace
from inlaid.kernels.early import early
from inlaid.kernels.kv_codes import largest_code
from inlaid.kernels.kv_codes_triton import store_heads
from inlaid.kernels.lora_triton import Pending, nothing_pending, pending_part

if TYPE_CHECKING:
    from inlaid.kernels.context import StepContext


@triton.jit
def _normalized(x, weight, D: tl.constexpr, eps, d, mask):
    """Return x / sqrt(mean(x^2) + eps), rounded to the weight's type, times the weight; all in fp32 [BLOCK].

    x: fp32 [BLOCK], zero outside `mask`. weight: pointer to [D]. d: columns. D: the width, which the mean is over."""
    variance = tl.sum(x * x, axis=0) / D
    scaled = x * tl.rsqrt(variance + eps)
    w = tl.load(weight + d, mask=mask, other=0.0)
    return scaled.to(w.dtype).to(tl.float32) * w.to(tl.float32)


@triton.jit
def _embed_norm_kernel(
    ids, sources, last, table, weight, residual, out, eps, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """residual[t] = table[token]; out[t] = rms_norm(residual[t]) * weight, where token = last[sources[t]] if
    sources[t] >= 0 else ids[t]. Grid: (T,), a program for each token.

    ids: int32 [T], token ids known to the host. sources: int32 [T], the row whose newest token this is, or -1.
    last: int32 [R], the newest token of each row. table: [V, D]. weight: [D]. residual, out: [T, D], contiguous.
    BLOCK: a power of two, at least D.

    A token that an earlier step sampled is taken from the device, so that steps never wait for the host."""
    t = tl.program_id(0).to(tl.int64)
    source = tl.load(sources + t)
    fresh = tl.load(last + tl.maximum(source, 0))
    token = tl.where(source >= 0, fresh, tl.load(ids + t)).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < D
    row = tl.load(table + token * D + d, mask=mask, other=0.0)
    tl.store(residual + t * D + d, row, mask=mask)
    y = _normalized(row.to(tl.float32), weight, D, eps, d, mask)
    tl.store(out + t * D + d, y.to(row.dtype), mask=mask)


@triton.jit(do_not_specialize=["site", "height"])
def _add_norm_kernel(
    x, residual, weight, rows, out, eps, counts, part_stride, height,
    partial, partial_stride, pool, table, scale, adapters, num_sites, site,
    D: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, KEEP: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, P: tl.constexpr, R_STRIDE: tl.constexpr, BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """sum = residual[s] + x[s] + pending[s]; out[t] = rms_norm(sum) * weight; with KEEP residual[s] = sum, where
    s = rows[t] with GATHER, else t. Grid: one program for each row of `out`.

    x: [T, D], or [PARTS, T, D] with PARTS > 1: parts 0 to counts - 1 are added in order in fp32 and rounded once.
    residual: [T, D]. weight: [D]. rows: int32, one for each program; read with GATHER only. out: [programs, D].
    counts: int32 [ceil(T / height), D / WIDTH], the parts of each tile of `height` rows and WIDTH columns; the others
    were never written. part_stride: elements from part to part. BLOCK: a power of two, at least D.

    Each of x, x + pending and the sum is rounded to the compute type before it is used further. KEEP without GATHER
    only: several programs must not write one row. The counts are constant, so they are read before the wait of an early
    launch."""
    t = tl.program_id(0).to(tl.int64)
    source = tl.load(rows + t).to(tl.int64) if GATHER else t
    d = tl.arange(0, BLOCK)
    mask = d < D
    if PARTS > 1:  # nothing writes the counts: they need not be waited for
        count = tl.load(counts + source // height * (D // WIDTH) + d // WIDTH, mask=mask, other=1)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = tl.load(x + source * D + d, mask=mask, other=0.0)
    if PARTS > 1:
        total = value.to(tl.float32)
        for p in tl.static_range(1, PARTS):
            total += tl.load(x + p * part_stride + source * D + d, mask=mask & (p < count), other=0.0).to(tl.float32)
        value = total.to(value.dtype)
    if P > 0:
        part = pending_part(
            source, 0, d, mask, partial, partial_stride, pool, table, scale, adapters, num_sites, site,
            GROUPS, P, R_STRIDE, BLOCK_R,
        )  # fmt: skip
        value = (value.to(tl.float32) + part).to(value.dtype)
    before = tl.load(residual + source * D + d, mask=mask, other=0.0)
    value = (before.to(tl.float32) + value.to(tl.float32)).to(value.dtype)
    if KEEP:
        tl.store(residual + source * D + d, value, mask=mask)
    y = _normalized(value.to(tl.float32), weight, D, eps, d, mask)
    tl.store(out + t * D + d, y.to(value.dtype), mask=mask)


@triton.jit
def _head_norm(x_lo, x_hi, weight, c, half: tl.constexpr, C: tl.constexpr, eps, c_mask):
    """Return the RMS norm of whole heads held as two halves, times the weight, rounded to the weight's type, as fp32.

    x_lo, x_hi: fp32 [heads, HALF_PAD], zero outside `c_mask`. weight: pointer to [C]. c: columns of a half."""
    variance = (tl.sum(x_lo * x_lo, axis=1) + tl.sum(x_hi * x_hi, axis=1)) / C
    factor = tl.rsqrt(variance + eps)[:, None]
    w_lo = tl.load(weight + c, mask=c_mask, other=0.0)
    w_hi = tl.load(weight + half + c, mask=c_mask, other=0.0)
    lo = (x_lo * factor).to(w_lo.dtype).to(tl.float32) * w_lo.to(tl.float32)[None, :]
    hi = (x_hi * factor).to(w_lo.dtype).to(tl.float32) * w_hi.to(tl.float32)[None, :]
    return lo.to(w_lo.dtype).to(tl.float32), hi.to(w_lo.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["site"])
def _rope_store_kernel(
    qkv, qkv_row, positions, slots, cos, sin, k_cache, v_cache, kv_scales, kv_scale_row, q_weight, k_weight, eps,
    partial, partial_stride, pool, table, scale, adapters, num_sites, site,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, HALF_PAD: tl.constexpr, HEADS: tl.constexpr,
    NORM: tl.constexpr, PAGE: tl.constexpr, LARGEST: tl.constexpr,
    GROUPS: tl.constexpr, P: tl.constexpr, R_STRIDE: tl.constexpr, BLOCK_R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Complete q, k and v of a token; rotate q in place; write rotated k, and v, to the token's slot in the caches.

    x = qkv + pending; with NORM q and k are RMS-normalized head by head; then for halves (lo, hi) of a head and the
    angle a of column and position: lo' = lo cos(a) - hi sin(a), hi' = hi cos(a) + lo sin(a).
    Grid: (T, (H + 2 G) / HEADS); a program has HEADS heads of one kind, as HEADS divides H and G.

    qkv: [T, (H + 2 G) C], rows `qkv_row` elements apart: H query heads, G key heads, G value heads. positions: int [T].
    slots: int [T], block * block_size + offset. cos, sin: [positions, C], both halves alike. k_cache, v_cache:
    [slots, G, C]. q_weight, k_weight: [C]; read with NORM only. HALF_PAD: a power of two, at least C / 2.
    LARGEST: the largest code, where the caches hold codes (`spec.kv_codes` of what is rounded to the compute type); 0:
    they hold numbers, and `kv_scales` is not written. kv_scales: float16 [blocks, G, PAGE, 2], blocks `kv_scale_row`
    elements apart.

    Distinct tokens must have distinct slots, padding aside. Products with the cosine are rounded to the compute type
    as in cpu.py."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    head0 = tl.program_id(1) * HEADS
    half: tl.constexpr = C // 2
    c = tl.arange(0, HALF_PAD)
    c_mask = c < half
    h = tl.arange(0, HEADS)
    mask = (h < HEADS)[:, None] & c_mask[None, :]
    at = qkv + t * qkv_row + (head0 + h)[:, None] * C + c[None, :]
    lo = tl.load(at, mask=mask, other=0.0)
    hi = tl.load(at + half, mask=mask, other=0.0)
    slot = tl.load(slots + t).to(tl.int64)
    if P > 0:
        sibling = (head0 >= H).to(tl.int32) + (head0 >= H + G).to(tl.int32)
        first = tl.where(sibling == 0, 0, tl.where(sibling == 1, H, H + G))
        flat = tl.arange(0, HEADS * HALF_PAD)
        n = (head0 - first + flat // HALF_PAD) * C + flat % HALF_PAD
        n_mask = flat % HALF_PAD < half
        part = pending_part(
            t, sibling, n, n_mask, partial, partial_stride, pool, table, scale, adapters, num_sites, site,
            GROUPS, P, R_STRIDE, BLOCK_R,
        )  # fmt: skip
        lo = (lo.to(tl.float32) + tl.reshape(part, (HEADS, HALF_PAD))).to(lo.dtype)
        part = pending_part(
            t, sibling, n + half, n_mask, partial, partial_stride, pool, table, scale, adapters, num_sites, site,
            GROUPS, P, R_STRIDE, BLOCK_R,
        )  # fmt: skip
        hi = (hi.to(tl.float32) + tl.reshape(part, (HEADS, HALF_PAD))).to(hi.dtype)
    at_scale = kv_scales + slot // PAGE * kv_scale_row + slot % PAGE * 2
    if head0 >= H + G:  # values: only moved
        group = head0 - H - G + h
        to = v_cache + (slot * G + group)[:, None] * C + c[None, :]
        store_heads(lo, hi, to, half, mask, at_scale + (group * PAGE * 2 + 1)[:, None], LARGEST)
    else:
        position = tl.load(positions + t).to(tl.int64)
        x_lo = lo.to(tl.float32)
        x_hi = hi.to(tl.float32)
        if NORM:
            x_lo, x_hi = _head_norm(
                x_lo, x_hi, q_weight if head0 < H else k_weight, c, half, C, eps, c_mask
            )  # fmt: skip
        cos_c = tl.load(cos + position * C + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
        sin_c = tl.load(sin + position * C + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
        turned_lo = (x_lo * cos_c).to(lo.dtype).to(tl.float32) - x_hi * sin_c
        turned_hi = (x_hi * cos_c).to(lo.dtype).to(tl.float32) + x_lo * sin_c
        if head0 < H:
            tl.store(at, turned_lo.to(lo.dtype), mask=mask)
            tl.store(at + half, turned_hi.to(lo.dtype), mask=mask)
        else:
            group = head0 - H + h
            to = k_cache + (slot * G + group)[:, None] * C + c[None, :]
            k_scale = at_scale + (group * PAGE * 2)[:, None]
            store_heads(turned_lo.to(lo.dtype), turned_hi.to(lo.dtype), to, half, mask, k_scale, LARGEST)


@triton.jit(do_not_specialize=["site"])
def _silu_mul_kernel(
    x, out, partial, partial_stride, pool, table, scale, adapters, num_sites, site,
    F: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, P: tl.constexpr, R_STRIDE: tl.constexpr, BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out[t, f] = silu(gate) * up with gate = x[t, f], up = x[t, F + f], both completed by what is pending;
    silu(g) = g / (1 + exp(-g)), rounded to the compute type. Grid: (T, ceil(F / BLOCK)).

    x: [T, 2 F], contiguous. out: [T, F]. The pending expansion has two siblings, gate and up."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < F
    gate = tl.load(x + t * 2 * F + f, mask=mask, other=0.0)
    up = tl.load(x + t * 2 * F + F + f, mask=mask, other=0.0)
    if P > 0:
        part = pending_part(
            t, 0, f, mask, partial, partial_stride, pool, table, scale, adapters, num_sites, site,
            GROUPS, P, R_STRIDE, BLOCK_R,
        )  # fmt: skip
        gate = (gate.to(tl.float32) + part).to(gate.dtype)
        part = pending_part(
            t, 1, f, mask, partial, partial_stride, pool, table, scale, adapters, num_sites, site,
            GROUPS, P, R_STRIDE, BLOCK_R,
        )  # fmt: skip
        up = (up.to(tl.float32) + part).to(up.dtype)
    g = gate.to(tl.float32)
    active = (g / (1.0 + tl.exp(-g))).to(gate.dtype).to(tl.float32)
    tl.store(out + t * F + f, (active * up.to(tl.float32)).to(gate.dtype), mask=mask)


@triton.jit(do_not_specialize=["table_row"])
def _gather_tables_kernel(tables, table_row, rows, lengths, out, page: tl.constexpr, BLOCK: tl.constexpr):
    """out[s, :n] = tables[rows[s], :n] with n = ceil(lengths[s] / page). Grid: (S,).

    tables: int32 [R, W]; out: int32 [S, W]; rows of both are `table_row` elements apart. rows, lengths: int32 [S]."""
    s = tl.program_id(0).to(tl.int64)
    used = tl.cdiv(tl.load(lengths + s), page)
    row = tl.load(rows + s).to(tl.int64)
    for start in range(0, used, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(out + s * table_row + i, tl.load(tables + row * table_row + i, mask=i < used), mask=i < used)


@triton.jit(do_not_specialize=["count"])
def _scatter_kernel(target, places, values, count, BLOCK: tl.constexpr):
    """target[places[i]] = values[i] for i < count; all int32, places distinct. Grid: (ceil(count / BLOCK),)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + i, mask=i < count)
    tl.store(target + place, tl.load(values + i, mask=i < count), mask=i < count)


def gather_tables(
    tables_RW: torch.Tensor, rows_S: torch.Tensor, lengths_S: torch.Tensor, out_SW: torch.Tensor, page: int
) -> None:
    """Set out[s] = tables[rows[s]], as far as the sequence's length reaches; `page` tokens fill a block."""
    _gather_tables_kernel[(out_SW.shape[0],)](
        tables_RW, tables_RW.stride(0), rows_S, lengths_S, out_SW, page=page, BLOCK=256, num_warps=1
    )


def scatter(target: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> None:
    """Set target.flatten()[places] = values."""
    count = places.shape[0]
    _scatter_kernel[(triton.cdiv(count, 256),)](target, places, values, count, BLOCK=256, num_warps=2)


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8


def embed_norm(
    ids_T: torch.Tensor,
    sources_T: torch.Tensor,
    last_R: torch.Tensor,
    table_VD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor,
    out_TD: torch.Tensor,
) -> None:
    """Write the embedding of each token to residual and its norm to out. Where sources[t] >= 0 the token is
    last[sources[t]], which an earlier step sampled and the host has not seen yet; else it is ids[t]."""
    width = table_VD.shape[1]
    _embed_norm_kernel[(ids_T.shape[0],)](
        ids_T, sources_T, last_R, table_VD, weight_D, residual_TD, out_TD, eps,
        D=width, BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip


def norm(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    rows_L: torch.Tensor | None = None,
    keep: bool = True,
    pending: Pending | None = None,
    warps: int = 0,
    parts: Parts | None = None,
) -> None:
    """Write rms_norm(x + residual) to out, for all rows or those listed; with `keep` write the sum to residual.

    `pending` is added to x first. With `parts` x is [P, T, D], and the sum of its parts, rounded once, stands for x.
    `warps` 0: as measured."""
    width = weight_D.shape[0]
    arguments = nothing_pending(x_TD) if pending is None else pending.arguments(block_r=8)  # 16 would spill registers
    warps = warps or _warps(width) * (1 if pending is None else 2)
    rows = x_TD.numel() // width if parts is None else x_TD.shape[1]
    most, height, tile = (1, 1, 1) if parts is None else (parts.most, parts.height, parts.width)
    _add_norm_kernel[(rows if rows_L is None else rows_L.shape[0],)](
        x_TD, residual_TD, weight_D, rows_L if rows_L is not None else x_TD,
        out_TD, eps, x_TD if parts is None else parts.counts, rows * width, height,
        D=width, BLOCK=triton.next_power_of_2(width), GATHER=rows_L is not None,
        KEEP=keep, PARTS=most, WIDTH=tile, **arguments,
        **early(alone=rows_L is None and not (pending and pending.joins)), num_warps=warps,
    )  # fmt: skip


def rope_store(
    qkv_TN: torch.Tensor,
    positions_T: torch.Tensor,
    kv_slots_T: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    head_norms: HeadNorms | None = None,
    pending: Pending | None = None,
    heads: int = 0,
    warps: int = 0,
    scales: torch.Tensor | None = None,
) -> None:
    """Rotate the queries in place; write rotated keys, and values, to their pages.

    `head_norms` are applied to queries and keys before the rotation, `pending` is added to qkv before that. cos and sin
    are tables by position. `heads` of a program and `warps` 0: as measured. `scales` [blocks, G, page, 2]: the pages
    hold codes."""
    kv_heads, width = k_cache.shape[2:]
    together = math.gcd(math.gcd(num_heads, kv_heads), heads or (8 if pending is None else 64 // pending.block_r))
    arguments = nothing_pending(qkv_TN) if pending is None else pending.arguments()
    warps = warps or (max(1, together * width // 512) if pending is None else 4)
    norms = head_norms or HeadNorms(cos, cos, 0.0)
    given = (k_cache, 0, 0) if scales is None else (scales, scales.stride(0), largest_code(k_cache.dtype))
    _rope_store_kernel[(qkv_TN.shape[0], (num_heads + 2 * kv_heads) // together)](
        qkv_TN, qkv_TN.stride(0), positions_T, kv_slots_T, cos, sin, k_cache, v_cache, *given[:2],
        norms.q_weight_C, norms.k_weight_C, norms.eps,
        H=num_heads, G=kv_heads, C=width, HALF_PAD=triton.next_power_of_2(width // 2), HEADS=together,
        NORM=head_norms is not None, PAGE=k_cache.shape[1], LARGEST=given[2], **arguments,
        **early(alone=not (pending and pending.joins)), num_warps=warps,
    )  # fmt: skip


def silu_mul(
    x_T2F: torch.Tensor, out_TF: torch.Tensor, pending: Pending | None = None, block: int = 0, warps: int = 4
) -> None:
    """Write silu(first half of x) * second half to out; `pending` is added to x first. `block` 0: as measured."""
    rows, width = out_TF.shape
    block = block or (1024 if pending is None else 256)
    arguments = nothing_pending(x_T2F) if pending is None else pending.arguments()
    _silu_mul_kernel[(rows, triton.cdiv(width, block))](
        x_T2F,
        out_TF,
        F=width,
        BLOCK=block,
        **arguments,
        **early(alone=not (pending and pending.joins)),
        num_warps=warps,
    )


class TritonOps:
    """The operations between the linears, one launch each, into the buffers of a workspace."""

    def embed_norm(
        self, step: StepContext, table_VD: torch.Tensor, weight_D: torch.Tensor, eps: float, workspace: Workspace
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = step.num_tokens, table_VD.shape[1]
        residual_TD, out_TD = workspace.take("residual", *shape), workspace.take("normed", *shape)
        device = step.on_device
        assert device is not None
        embed_norm(step.ids_T, device.sources_T, device.newest_R, table_VD, weight_D, eps, residual_TD, out_TD)
        return residual_TD, out_TD

    def add_norm(
        self,
        product: Product,
        residual_TD: torch.Tensor,
        weight_D: torch.Tensor,
        eps: float,
        workspace: Workspace,
        rows_L: torch.Tensor | None = None,
        keep: bool = True,
    ) -> torch.Tensor:
        rows, width = residual_TD.shape
        name, rows = ("normed", rows) if rows_L is None else ("hidden", rows_L.shape[0])
        out = workspace.take(name, rows, width)
        norm(product.tensor, weight_D, eps, out, residual_TD, rows_L, keep, product.pending, parts=product.parts)
        return out

    def angles(self, cos: torch.Tensor, sin: torch.Tensor, step: StepContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tables as they are: the kernel looks positions up."""
        return cos, sin

    def rope_store(
        self,
        product: Product,
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache,
        num_heads: int,
        head_norms: HeadNorms | None,
        step: StepContext,
    ) -> torch.Tensor:
        qkv_TN, width = product.tensor, cache.keys.shape[3]
        rope_store(
            qkv_TN, step.positions_T, step.kv_slots_T, *angles, *cache[:2], num_heads, head_norms, product.pending,
            scales=cache.scales,
        )  # fmt: skip
        return qkv_TN[:, : num_heads * width].view(-1, num_heads, width)

    def activate(self, product: Product, workspace: Workspace) -> torch.Tensor:
        rows, width = product.tensor.shape
        out_TF = workspace.take("activated", rows, width // 2)
        silu_mul(product.tensor, out_TF, product.pending)
        return out_TF
