# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
"""Attention of a few queries to each sequence over paged keys and values: the newest token of an answer and guesses at
those behind it. As in a decode the context is split, since few queries alone do not fill a chip; keys and values are
read once for all queries of a sequence and all query heads of a group. `attention_triton.TritonAttention` calls it.

Arguments are those of `attention_triton`; `starts` int32 [S + 1] says where the rows of each sequence begin, and its
last query is its last cached token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from inlaid.kernels.kv_codes_triton import scales_of, words

MAX_QUERIES = 16  # of a sequence, in one step
BLOCK = 64  # tokens of an iteration


@triton.jit
def _verify_kernel(
    q, q_row, k_cache, v_cache, cache_row, scales, scale_row, tables, table_row, lengths, starts,
    partial, stats, scale, window,
    H: tl.constexpr, GROUP: tl.constexpr, ROWS_PAD: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """Compute each split's part of out[r, h] = softmax(q[r, h] k[g]^T) v[g], causal, for the queries r of a sequence
    and the GROUP query heads h of a key/value head g. Grid: (G, S, SPLITS).

    partial: fp32 [rows, H, SPLITS, C], weighted sums; stats: fp32 [rows, H, SPLITS, 2], maximum and sum of weights. A
    split without tokens writes a maximum of -1e30 and sums of 0. ROWS_PAD: a power of two, at least 16 and the most
    queries times GROUP; row i of a program is query i // GROUP and head i % GROUP."""
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    row0 = tl.load(starts + sequence)
    queries = tl.load(starts + sequence + 1) - row0
    if queries > 0:
        length = tl.load(lengths + sequence)
        first = tl.where(window > 0, tl.maximum(length - queries + 1 - window, 0), 0)
        first = (first // BLOCK) * BLOCK
        chunk = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK) * BLOCK
        begin = first + split * chunk
        end = tl.minimum(begin + chunk, length)
        i = tl.arange(0, ROWS_PAD)
        query = i // GROUP
        i_mask = query < queries
        position = length - queries + query
        rows = (row0 + query).to(tl.int64)
        heads = kv_head * GROUP + i % GROUP
        c = tl.arange(0, C_PAD)
        c_mask = c < C
        both = i_mask[:, None] & c_mask[None, :]
        q_IC = tl.load(q + rows[:, None] * q_row + heads[:, None] * C + c[None, :], mask=both, other=0.0)
        m = tl.full((ROWS_PAD,), -1e30, tl.float32)
        total = tl.zeros((ROWS_PAD,), tl.float32)
        acc = tl.zeros((ROWS_PAD, C_PAD), tl.float32)
        lane = tl.arange(0, BLOCK)
        table = tables + sequence.to(tl.int64) * table_row
        for start in range(begin, end, BLOCK):
            t = start + lane
            inside = t < end
            page = tl.load(table + t // PAGE, mask=inside, other=0).to(tl.int64)
            at = (page * PAGE + t % PAGE) * cache_row + kv_head * C
            mask = inside[:, None] & c_mask[None, :]
            k_BC = tl.load(k_cache + at[:, None] + c[None, :], mask=mask, other=0.0)
            v_BC = tl.load(v_cache + at[:, None] + c[None, :], mask=mask, other=0.0)
            if CODED:
                k_scale, v_scale = scales_of(scales + page * scale_row + kv_head * PAGE, t % PAGE, inside)
                k_BC, v_BC = k_BC.to(q_IC.dtype), v_BC.to(q_IC.dtype) * v_scale.to(q_IC.dtype)[:, None]
            score = tl.dot(q_IC, tl.trans(k_BC)) * scale
            if CODED:
                score = score * k_scale[None, :]
            seen = (t[None, :] <= position[:, None]) & inside[None, :]
            seen = seen & ((window <= 0) | (t[None, :] > position[:, None] - window))
            score = tl.where(seen, score, -1e30)
            m_new = tl.maximum(m, tl.max(score, axis=1))
            keep = tl.exp2(m - m_new)
            p = tl.where(seen, tl.exp2(score - m_new[:, None]), 0.0)
            total = total * keep + tl.sum(p, axis=1)
            acc = acc * keep[:, None] + tl.dot(p.to(v_BC.dtype), v_BC)
            m = m_new
        at_split = (rows * H + heads) * SPLITS + split
        tl.store(partial + at_split[:, None] * C + c[None, :], acc, mask=both)
        tl.store(stats + at_split * 2, m, mask=i_mask)
        tl.store(stats + at_split * 2 + 1, total, mask=i_mask)


@triton.jit
def _merge_rows_kernel(
    partial, stats, starts, num_sequences, out, out_row,
    H: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out[r, h] = sum over splits of weight * partial / sum over splits of weight * total, with weight = 2^(m - max m),
    for rows of sequences; rows of padding get zeros. Grid: (rows, H).

    partial, stats: as `_verify_kernel` wrote them. starts: int32 [num_sequences + 1]."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    inside = (row >= tl.load(starts)) & (row < tl.load(starts + num_sequences))
    s = tl.arange(0, SPLITS)
    used = s < tl.where(inside, SPLITS, 0)
    at = (row.to(tl.int64) * H + head) * SPLITS + s
    m = tl.load(stats + at * 2, mask=used, other=-1e30)
    total = tl.load(stats + at * 2 + 1, mask=used, other=0.0)
    weight = tl.exp2(m - tl.max(m, axis=0))
    c = tl.arange(0, C_PAD)
    acc = tl.load(partial + at[:, None] * C + c[None, :], mask=used[:, None] & (c < C)[None, :], other=0.0)
    mixed = tl.sum(acc * weight[:, None], axis=0) / tl.maximum(tl.sum(total * weight, axis=0), 1e-30)
    tl.store(out + row.to(tl.int64) * out_row + head * C + c, mixed.to(out.dtype.element_ty), mask=c < C)


def verify(
    q_THC: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_SB: torch.Tensor,
    lengths_S: torch.Tensor,
    starts_S1: torch.Tensor,
    out_THC: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
    splits: int,
    most_queries: int,
    window: int = 0,
    scale: float | None = None,
    scales: torch.Tensor | None = None,
) -> None:
    """Write causal attention of every sequence's queries, at most `most_queries` of each, to out; zeros for other rows.

    `scales` [blocks, G, page, 2]: the caches hold codes. `scratch`: fp32 [T * H * splits * C] and [T * H * splits * 2],
    read and written here only."""
    rows, heads, width = q_THC.shape
    page, kv_heads = k_cache.shape[1], k_cache.shape[2]
    group = heads // kv_heads
    exponent = (width**-0.5 if scale is None else scale) * 1.4426950408889634  # the kernels work in powers of two
    pad = max(16, triton.next_power_of_2(width))
    _verify_kernel[(kv_heads, lengths_S.shape[0], splits)](
        q_THC, q_THC.stride(0), k_cache, v_cache, k_cache.stride(1), *words(scales, k_cache), tables_SB,
        tables_SB.stride(0), lengths_S, starts_S1, *scratch, exponent, window,
        H=heads, GROUP=group, ROWS_PAD=max(16, triton.next_power_of_2(most_queries * group)), C=width, C_PAD=pad,
        PAGE=page, BLOCK=BLOCK, SPLITS=splits, CODED=scales is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    _merge_rows_kernel[(rows, heads)](
        *scratch, starts_S1, lengths_S.shape[0], out_THC, out_THC.stride(0),
        H=heads, C=width, C_PAD=pad, SPLITS=splits, num_warps=1,
    )  # fmt: skip
