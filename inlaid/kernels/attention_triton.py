# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
"""Attention over paged keys and values on any GPU that Triton serves: decode split over the context, and prefill of
chunks. The transformer calls `TritonAttention`.

Lengths, block tables and query tiles are read on the device, so nothing is planned on the host and a captured graph
serves every batch of its size. Decode splits each sequence into `splits` runs of tokens whose results a second kernel
merges in a fixed order: the same bits every time.

Arguments that the kernels share:
  q, q_row           queries [rows, H, C], rows `q_row` elements apart
  k_cache, v_cache   [blocks, PAGE, G, C]; a token is `cache_row` elements after the one before it in its page
  scales, scale_row  with CODED, where k_cache and v_cache hold codes of 8 bits: int32 [blocks, G, PAGE], blocks
                     `scale_row` apart, of two float16 each, as `scales_of` reads them; unread without CODED
  tables, table_row  int32 [S, blocks]: the pages of each sequence, rows `table_row` elements apart
  lengths            int32 [S]: cached tokens of each sequence; a sequence of padding has 0
  out, out_row       [rows, H, C], rows `out_row` elements apart
  scale              C^-0.5 * log2(e): the kernels work in powers of two
  window             tokens that a query sees, itself included; 0: all before it
  C_PAD              a power of two, at least C
Softmax is computed online: m is the running maximum, `total` and `acc` the sums of weights and weighted values at it.

Shapes: S sequences, T tokens, H query heads, G key/value heads, C head width; caches are [blocks, page, G, C].
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from inlaid.kernels.backend import LayerCache, Workspace
from inlaid.kernels.early import early
from inlaid.kernels.fused_triton import gather_tables
from inlaid.kernels.kv_codes_triton import scales_of, words
from inlaid.kernels.verify_triton import verify

if TYPE_CHECKING:
    from inlaid.kernels.context import StepContext

TARGET_PROGRAMS = 500  # enough to fill a large chip; more splits cost more than they bring (measured on an H100)
MAX_SPLITS = 16
TILES: Mapping[tuple[bool, bool], tuple[int, int, int]] = MappingProxyType({  # tokens, warps, stages of a decode
    (False, False): (32, 4, 3),  # with as many key/value heads as query heads
    (True, False): (64, 4, 3),  # with fewer
    (False, True): (32, 4, 3),  # the same two with codes of 8 bits
    (True, True): (128, 4, 3),
})  # fmt: skip
QUERY_TILE = 64  # queries of a prefill's program


@triton.jit
def _span(length, window, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first token that is read, a multiple of BLOCK, and how many tokens each split reads, likewise."""
    begin = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    begin = (begin // BLOCK) * BLOCK
    chunk = tl.cdiv(tl.cdiv(length - begin, SPLITS), BLOCK) * BLOCK
    return begin, chunk


@triton.jit
def _decode_one_kernel(
    q, q_row, k_cache, v_cache, cache_row, scales, scale_row, tables, table_row, lengths, out, out_row,
    partial, stats, scale, window,
    H: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, CODED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[s, h] = softmax(q[s, h] k[h]^T) v[h] over the sequence's tokens, where H = G. Grid: (H, S, SPLITS).

    partial: fp32 [S, H, SPLITS, C], weighted sums of each split; stats: fp32 [S, H, SPLITS, 2], its maximum and sum of
    weights; both unused with SPLITS 1, when `out` is written here. BLOCK: tokens of an iteration. STAGES: of the loop's
    pipeline; with 1 the pages of the next block are asked for by hand.

    Every lane of the block keeps its own running maximum, so that the loop needs no exchange between warps; the lanes
    are merged once, at the end. The first split of an empty sequence writes zeros. The head is the fastest grid
    dimension, so that programs side by side read the same pages."""
    if EARLY:  # what follows is not let in: its blocks would wait in the place of ours, of which there are many
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + sequence)
    first, chunk = _span(length, window, SPLITS, BLOCK)
    begin = first + split * chunk
    end = tl.minimum(begin + chunk, length)
    c = tl.arange(0, C_PAD)
    c_mask = c < C
    lane = tl.arange(0, BLOCK)
    if (begin < end) | (split == 0):
        q_C = tl.load(q + sequence.to(tl.int64) * q_row + head * C + c, mask=c_mask, other=0.0).to(tl.float32) * scale
        m = tl.full((BLOCK,), -1e30, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        acc = tl.zeros((BLOCK, C_PAD), tl.float32)
        table = tables + sequence.to(tl.int64) * table_row
        page = tl.load(table + (begin + lane) // PAGE, mask=begin + lane < end, other=0)
        for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
            t = start + lane
            inside = t < end
            if STAGES == 1:  # the next block's pages are asked for before this block's keys are waited for
                following = tl.load(table + (t + BLOCK) // PAGE, mask=t + BLOCK < end, other=0)
            else:
                page = tl.load(table + t // PAGE, mask=inside, other=0)
            at = (page.to(tl.int64) * PAGE + t % PAGE) * cache_row + head * C
            mask = inside[:, None] & c_mask[None, :]
            k_BC = tl.load(k_cache + at[:, None] + c[None, :], mask=mask, other=0.0)
            v_BC = tl.load(v_cache + at[:, None] + c[None, :], mask=mask, other=0.0)
            score = tl.sum(k_BC.to(tl.float32) * q_C[None, :], axis=1)
            if CODED:
                k_scale, v_scale = scales_of(scales + page.to(tl.int64) * scale_row + head * PAGE, t % PAGE, inside)
                score = score * k_scale
            seen = inside & ((window <= 0) | (t >= length - window))
            score = tl.where(seen, score, -1e30)
            m_new = tl.maximum(m, score)
            keep = tl.exp2(m - m_new)
            p = tl.where(seen, tl.exp2(score - m_new), 0.0)
            total = total * keep + p
            if CODED:
                p = p * v_scale
            acc = acc * keep[:, None] + p[:, None] * v_BC.to(tl.float32)
            m = m_new
            if STAGES == 1:
                page = following
        top = tl.max(m, axis=0)
        weight = tl.exp2(m - top)
        total_all = tl.sum(total * weight, axis=0)
        mixed = tl.sum(acc * weight[:, None], axis=0)
        if SPLITS == 1:
            mixed = mixed / tl.maximum(total_all, 1e-30)
            tl.store(out + sequence.to(tl.int64) * out_row + head * C + c, mixed.to(out.dtype.element_ty), mask=c_mask)
        else:
            at_split = (sequence * H + head) * SPLITS + split
            tl.store(partial + at_split.to(tl.int64) * C + c, mixed, mask=c_mask)
            tl.store(stats + at_split * 2, top)
            tl.store(stats + at_split * 2 + 1, total_all)


@triton.jit
def _decode_group_kernel(
    q, q_row, k_cache, v_cache, cache_row, scales, scale_row, tables, table_row, lengths, out, out_row,
    partial, stats, scale, window,
    H: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, CODED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[s, h] = softmax(q[s, h] k[g]^T) v[g] for the GROUP query heads h of each key/value head g, on the matrix
    units. Grid: (G, S, SPLITS).

    partial, stats, BLOCK: as in `_decode_one_kernel`. GROUP = H / G; GROUP_PAD: a power of two, at least GROUP and 16,
    as the matrix units take no fewer rows."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + sequence)
    first, chunk = _span(length, window, SPLITS, BLOCK)
    begin = first + split * chunk
    end = tl.minimum(begin + chunk, length)
    c = tl.arange(0, C_PAD)
    c_mask = c < C
    g = tl.arange(0, GROUP_PAD)
    g_mask = g < GROUP
    lane = tl.arange(0, BLOCK)
    heads = kv_head * GROUP + g
    if (begin < end) | (split == 0):
        q_rows = q + sequence.to(tl.int64) * q_row + heads[:, None] * C + c[None, :]
        q_GC = tl.load(q_rows, mask=g_mask[:, None] & c_mask[None, :], other=0.0)
        m = tl.full((GROUP_PAD,), -1e30, tl.float32)
        total = tl.zeros((GROUP_PAD,), tl.float32)
        acc = tl.zeros((GROUP_PAD, C_PAD), tl.float32)
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
                k_BC, v_BC = k_BC.to(q_GC.dtype), v_BC.to(q_GC.dtype) * v_scale.to(q_GC.dtype)[:, None]
            score = tl.dot(q_GC, tl.trans(k_BC)) * scale
            if CODED:
                score = score * k_scale[None, :]
            seen = inside & ((window <= 0) | (t >= length - window))
            score = tl.where(seen[None, :], score, -1e30)
            m_new = tl.maximum(m, tl.max(score, axis=1))
            keep = tl.exp2(m - m_new)
            p = tl.where(seen[None, :], tl.exp2(score - m_new[:, None]), 0.0)
            total = total * keep + tl.sum(p, axis=1)
            acc = acc * keep[:, None] + tl.dot(p.to(v_BC.dtype), v_BC)
            m = m_new
        if SPLITS == 1:
            mixed = acc / tl.maximum(total, 1e-30)[:, None]
            rows = out + sequence.to(tl.int64) * out_row + heads[:, None] * C + c[None, :]
            tl.store(rows, mixed.to(out.dtype.element_ty), mask=g_mask[:, None] & c_mask[None, :])
        else:
            at_split = (sequence * H + heads) * SPLITS + split
            rows = partial + at_split[:, None].to(tl.int64) * C + c[None, :]
            tl.store(rows, acc, mask=g_mask[:, None] & c_mask[None, :])
            tl.store(stats + at_split * 2, m, mask=g_mask)
            tl.store(stats + at_split * 2 + 1, total, mask=g_mask)


@triton.jit
def _merge_kernel(
    partial, stats, lengths, out, out_row, window,
    H: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out[s, h] = sum over splits of weight * partial / sum over splits of weight * total, with weight = 2^(m - max m).
    Grid: (S, H).

    partial, stats: as `_decode_one_kernel` wrote them; splits beyond the sequence's end wrote nothing and are not read.
    BLOCK, SPLITS: those of the decode, from which `_span` finds the splits in use."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(lengths + sequence)
    first, chunk = _span(length, window, SPLITS, BLOCK)
    used = tl.maximum(tl.cdiv(length - first, tl.maximum(chunk, 1)), 1)
    s = tl.arange(0, SPLITS)
    at = (sequence * H + head) * SPLITS + s
    m = tl.load(stats + at * 2, mask=s < used, other=-1e30)
    total = tl.load(stats + at * 2 + 1, mask=s < used, other=0.0)
    weight = tl.exp2(m - tl.max(m, axis=0))
    c = tl.arange(0, C_PAD)
    rows = partial + at[:, None].to(tl.int64) * C + c[None, :]
    acc = tl.load(rows, mask=(s < used)[:, None] & (c < C)[None, :], other=0.0)
    mixed = tl.sum(acc * weight[:, None], axis=0) / tl.maximum(tl.sum(total * weight, axis=0), 1e-30)
    tl.store(out + sequence.to(tl.int64) * out_row + head * C + c, mixed.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def _prefill_kernel(
    q, q_row, k_cache, v_cache, cache_row, scales, scale_row, tables, table_row, lengths, starts, tiles, num_tiles,
    out, out_row, scale, window,
    GROUP: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """out[r, h] = softmax(q[r, h] k^T) v, causal, for a tile of BLOCK_M queries r of one sequence.
    Grid: (H, num_tiles).

    tiles: int32 [2, num_tiles]: the sequence of each tile (-1: no tile), and its first query, counted within the
    sequence's queries of this step. starts: int32 [S + 1], where the rows of each sequence begin. A sequence's last
    query is its last cached token, so that chunks of a prompt attend to what earlier steps cached. GROUP = H / G.
    BLOCK_N: tokens of an iteration, which begins at the page of the first token that the window lets in."""
    head = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = tl.load(tiles + tile)
    if sequence >= 0:
        offset = tl.load(tiles + num_tiles + tile)
        row0 = tl.load(starts + sequence)
        queries = tl.load(starts + sequence + 1) - row0
        length = tl.load(lengths + sequence)
        before = length - queries
        m_lane = offset + tl.arange(0, BLOCK_M)
        m_mask = m_lane < queries
        position = before + m_lane
        c = tl.arange(0, C_PAD)
        c_mask = c < C
        rows = (row0 + m_lane).to(tl.int64)
        q_MC = tl.load(
            q + rows[:, None] * q_row + head * C + c[None, :], mask=m_mask[:, None] & c_mask[None, :], other=0.0
        )
        m = tl.full((BLOCK_M,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, C_PAD), tl.float32)
        table = tables + sequence.to(tl.int64) * table_row
        end = tl.minimum(before + offset + BLOCK_M, length)
        begin = tl.where(window > 0, tl.maximum(before + offset - window + 1, 0), 0)
        begin = (begin // BLOCK_N) * BLOCK_N
        lane = tl.arange(0, BLOCK_N)
        for start in range(begin, end, BLOCK_N):
            t = start + lane
            inside = t < end
            page = tl.load(table + t // PAGE, mask=inside, other=0).to(tl.int64)
            at = (page * PAGE + t % PAGE) * cache_row + (head // GROUP) * C
            mask = inside[:, None] & c_mask[None, :]
            k_NC = tl.load(k_cache + at[:, None] + c[None, :], mask=mask, other=0.0)
            v_NC = tl.load(v_cache + at[:, None] + c[None, :], mask=mask, other=0.0)
            if CODED:
                k_scale, v_scale = scales_of(scales + page * scale_row + (head // GROUP) * PAGE, t % PAGE, inside)
                k_NC, v_NC = k_NC.to(q_MC.dtype), v_NC.to(q_MC.dtype) * v_scale.to(q_MC.dtype)[:, None]
            score = tl.dot(q_MC, tl.trans(k_NC)) * scale
            if CODED:
                score = score * k_scale[None, :]
            seen = (t[None, :] <= position[:, None]) & inside[None, :]
            seen = seen & ((window <= 0) | (t[None, :] > position[:, None] - window))
            score = tl.where(seen, score, -1e30)
            m_new = tl.maximum(m, tl.max(score, axis=1))
            keep = tl.exp2(m - m_new)
            p = tl.where(seen, tl.exp2(score - m_new[:, None]), 0.0)
            total = total * keep + tl.sum(p, axis=1)
            acc = acc * keep[:, None] + tl.dot(p.to(v_NC.dtype), v_NC)
            m = m_new
        mixed = acc / tl.maximum(total, 1e-30)[:, None]
        target = out + rows[:, None] * out_row + head * C + c[None, :]
        tl.store(target, mixed.to(out.dtype.element_ty), mask=m_mask[:, None] & c_mask[None, :])


def num_splits(sequences: int, kv_heads: int) -> int:
    """Return a power of two: many splits for few sequences, one when the batch alone fills the chip."""
    wanted = TARGET_PROGRAMS / max(1, sequences * kv_heads)
    splits = 1
    while splits < wanted and splits < MAX_SPLITS:
        splits *= 2
    return splits


def decode_scratch(
    sequences: int, heads: int, head_dim: int, splits: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp32 partial outputs and (maximum, sum) pairs for `decode`; one pair serves every layer."""
    count = sequences * heads * splits
    return (
        torch.empty(count * head_dim, dtype=torch.float32, device=device),
        torch.empty(count * 2, dtype=torch.float32, device=device),
    )


def decode(
    q_SHC: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_SB: torch.Tensor,
    lengths_S: torch.Tensor,
    out_SHC: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
    splits: int,
    window: int = 0,
    scale: float | None = None,
    tile: tuple[int, int, int] | None = None,
    scales: torch.Tensor | None = None,
) -> None:
    """Write softmax(q[s] k^T) v over the sequence's `lengths[s]` cached tokens to out[s]; zeros for length 0.

    `scratch` is that of `decode_scratch`, for these splits. `tile`: tokens, warps and stages of a program; None: as
    measured. `scales` [blocks, G, page, 2]: the caches hold codes."""
    sequences, heads, width = q_SHC.shape
    page, kv_heads = k_cache.shape[1], k_cache.shape[2]
    exponent = (width**-0.5 if scale is None else scale) * 1.4426950408889634  # the kernels work in powers of two
    pad, group = max(16, triton.next_power_of_2(width)), heads // kv_heads
    shared = (
        q_SHC, q_SHC.stride(0), k_cache, v_cache, k_cache.stride(1), *words(scales, k_cache), tables_SB,
        tables_SB.stride(0), lengths_S, out_SHC, out_SHC.stride(0), *scratch, exponent, window,
    )  # fmt: skip
    coded = scales is not None
    block, warps, stages = tile or TILES[group > 1, coded]
    shape = {"H": heads, "C": width, "C_PAD": pad, "PAGE": page, "BLOCK": block, "SPLITS": splits, "CODED": coded}
    if group == 1:
        _decode_one_kernel[(kv_heads, sequences, splits)](*shared, **shape, STAGES=stages, **early(), num_warps=warps)
    else:
        _decode_group_kernel[(kv_heads, sequences, splits)](
            *shared, GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)), **shape, **early(),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if splits > 1:
        _merge_kernel[(sequences, heads)](
            *scratch, lengths_S, out_SHC, out_SHC.stride(0), window,
            H=heads, C=width, C_PAD=pad, BLOCK=block, SPLITS=splits, **early(), num_warps=1 if splits <= 8 else 4,
        )  # fmt: skip


def prefill(
    q_THC: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_SB: torch.Tensor,
    lengths_S: torch.Tensor,
    starts_S1: torch.Tensor,
    tiles: torch.Tensor,
    out_THC: torch.Tensor,
    window: int = 0,
    scale: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
    warps: int = 4,
    stages: int = 3,
    scales: torch.Tensor | None = None,
) -> None:
    """Write causal attention of the queries named by `tiles` [2, n] to out; a sequence's last query is its last cached
    token. `scales`: as in `decode`."""
    heads, width = q_THC.shape[1:]
    page, kv_heads = k_cache.shape[1], k_cache.shape[2]
    exponent = (width**-0.5 if scale is None else scale) * 1.4426950408889634
    _prefill_kernel[(heads, tiles.shape[1])](
        q_THC, q_THC.stride(0), k_cache, v_cache, k_cache.stride(1), *words(scales, k_cache), tables_SB,
        tables_SB.stride(0), lengths_S, starts_S1, tiles, tiles.shape[1], out_THC, out_THC.stride(0), exponent, window,
        GROUP=heads // kv_heads, C=width, C_PAD=max(16, triton.next_power_of_2(width)), PAGE=page,
        BLOCK_M=block_m, BLOCK_N=block_n, CODED=scales is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def query_tiles(query_lens: tuple[int, ...], first: int, block_m: int = 64) -> list[tuple[int, int]]:
    """Return (sequence, first query) of every tile of the sequences from `first` on."""
    return [(s, at) for s in range(first, len(query_lens)) for at in range(0, query_lens[s], block_m)]


class TritonAttention:
    """Decodes for the first `num_decodes` sequences, prefills for the others; what differs is read on the device."""

    def plan(self, step: StepContext, workspace: Workspace) -> None:
        """Copy the block tables of the step's sequences side by side, in the order of the sequences."""
        assert step.on_device is not None
        tables_SB = workspace.take(
            "block_tables", step.num_decodes + step.num_prefills, step.block_tables.shape[1], dtype=torch.int32
        )
        gather_tables(step.block_tables, step.on_device.table_rows_S, step.context_lens_S, tables_SB, step.block_size)
        step.attention_plan = tables_SB

    def attend(
        self, q_THC: torch.Tensor, cache: LayerCache, window: int | None, step: StepContext, workspace: Workspace
    ) -> torch.Tensor:
        tables_SB: torch.Tensor = step.attention_plan
        rows, heads, width = q_THC.shape
        mixed = workspace.take("mixed", rows, heads * width)
        out_THC, count, device = mixed.view(rows, heads, width), step.num_decodes, step.on_device
        assert device is not None
        if count:
            splits = num_splits(count, cache[0].shape[2])
            scratch = (
                workspace.take("attention_sums", count, heads, splits, width, dtype=torch.float32),
                workspace.take("attention_stats", count, heads, splits, 2, dtype=torch.float32),
            )
            decode(
                q_THC[:count], *cache[:2], tables_SB[:count], step.context_lens_S[:count], out_THC[:count], scratch,
                splits, window or 0, scales=cache.scales,
            )  # fmt: skip
        if step.few_queries:
            splits = num_splits(step.num_prefills, cache[0].shape[2])
            sums = (
                workspace.take("attention_sums", rows, heads, splits, width, dtype=torch.float32),
                workspace.take("attention_stats", rows, heads, splits, 2, dtype=torch.float32),
            )
            verify(
                q_THC, *cache[:2], tables_SB[count:], step.context_lens_S[count:], device.starts_P1, out_THC, sums,
                splits, step.few_queries, window or 0, scales=cache.scales,
            )  # fmt: skip
        elif step.num_prefills:
            prefill(
                q_THC, *cache[:2], tables_SB[count:], step.context_lens_S[count:], device.starts_P1, device.tiles_2N,
                out_THC, window or 0, block_m=QUERY_TILE, scales=cache.scales,
            )  # fmt: skip
        return mixed
