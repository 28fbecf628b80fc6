"""The reference kernels against loops written out: adapters of any popularity, attention over pages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inlaid.kernels.backend import AdapterPages, Site
from inlaid.kernels.context import StepContext
from inlaid.kernels.cpu import ReferenceAttention, ReferenceLora, ReferenceOps

SITES = 14
SITE = Site(0, (6, 4, 4))
either_way = pytest.mark.parametrize("side_by_side", [-1, 1 << 30])


def make_context(
    slots: tuple[int, ...],
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...] = (),
    table: torch.Tensor | None = None,
    block_size: int = 4,
) -> StepContext:
    tokens = sum(query_lens)
    lens = context_lens or query_lens
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    positions = torch.cat([torch.arange(length - n, length) for n, length in zip(query_lens, lens, strict=True)])
    kv_slots = torch.zeros(tokens, dtype=torch.int64)
    if table is not None:
        rows = torch.repeat_interleave(torch.arange(len(query_lens)), torch.tensor(query_lens))
        kv_slots = table[rows, positions // block_size].long() * block_size + positions % block_size
    return StepContext(
        positions_T=positions,
        kv_slots_T=kv_slots,
        block_tables_SB=torch.zeros(len(slots), 1, dtype=torch.int32) if table is None else table,
        context_lens_S=torch.tensor(lens, dtype=torch.int32),
        query_starts_S1=starts,
        logit_rows_L=starts[1:] - 1,
        adapter_slots_T=torch.zeros(tokens, dtype=torch.int32),
        block_size=block_size,
        num_decodes=next((i for i, n in enumerate(query_lens) if n > 1), len(query_lens)),
        max_context_len=max(lens),
        query_lens=query_lens,
        context_lens=lens,
        adapter_slots=slots,
        has_adapters=any(slots),
    )


def make_pages(ranks: list[list[int]], inputs: int) -> AdapterPages:
    """Slot by slot, the ranks of SITE's siblings."""
    torch.manual_seed(0)
    pages = AdapterPages(
        torch.randn(20_000), torch.zeros(len(ranks), SITES, 3, dtype=torch.int64), torch.rand(len(ranks), SITES), []
    )
    pages.versions += [0] * len(ranks)
    end = 0
    for slot, by_sibling in enumerate(ranks):
        for sibling, rank in enumerate(by_sibling):
            pages.table[slot, sibling] = torch.tensor((end, end + rank * inputs, rank))
            end += rank * (inputs + SITE.widths[sibling])
    return pages


def by_hand(pages: AdapterPages, x: torch.Tensor, slots: list[int], out: torch.Tensor) -> torch.Tensor:
    out = out.clone()
    for row, slot in enumerate(slots):
        start = 0
        for sibling, width in enumerate(SITE.widths):
            a_start, b_start, rank = pages.table[slot, sibling].tolist()
            a = pages.pool[a_start : a_start + rank * x.shape[1]].view(rank, x.shape[1])
            b = pages.pool[b_start : b_start + rank * width].view(width, rank)
            out[row, start : start + width] += pages.scale[slot, sibling] * (b @ (a @ x[row]))
            start += width
    return out


@either_way
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=4, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_adapters_equal_a_loop_over_rows(
    side_by_side: int, sequences: list[tuple[int, int]], ranks: list[list[int]]
) -> None:
    sequences.sort(key=lambda pair: pair[1] > 1)
    slots, lens = tuple(slot for slot, _ in sequences), tuple(length for _, length in sequences)
    pages = make_pages([[0, 0, 0], *ranks], inputs=8)
    lora = ReferenceLora(pages, side_by_side)
    context = make_context(slots, lens)
    x, out = torch.randn(sum(lens), 8), torch.randn(sum(lens), 14)
    rows = [slot for slot, length in sequences for _ in range(length)]
    want = by_hand(pages, x, rows, out)
    for _ in range(2):  # the second time from what was stacked
        got = out.clone()
        lora.plan(context)
        if context.has_adapters:
            lora.expand(lora.shrink(x, SITE, context), SITE, got, context)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@either_way
def test_a_product_with_anothers_adapter_may_overflow(side_by_side: int) -> None:
    """Side by side every row meets every adapter's A; what it is not meant for must not reach it, however large."""
    pages = make_pages([[0, 0, 0], [2, 1, 3], [1, 2, 2]], inputs=8)
    lora, context = ReferenceLora(pages, side_by_side), make_context((1, 2), (1, 1))
    alone, alone_context = ReferenceLora(pages, -1), make_context((2,), (1,))
    x, want, got = torch.randn(2, 8), torch.zeros(1, 14), torch.zeros(2, 14)
    alone.plan(alone_context)
    alone.expand(alone.shrink(x[1:], SITE, alone_context), SITE, want, alone_context)
    offset, _, rank = pages.table[1, SITE.first].tolist()
    pages.pool[offset : offset + rank * 8] = 3e38
    pages.versions[1] += 1
    lora.plan(context)
    lora.expand(lora.shrink(x * 10, SITE, context), SITE, got, context)
    torch.testing.assert_close(got[1:], 10 * want)


@either_way
def test_changed_slots_are_read_again(side_by_side: int) -> None:
    pages = make_pages([[0, 0, 0], [2, 1, 3]], inputs=8)
    lora, context = ReferenceLora(pages, side_by_side), make_context((1,), (1,))
    x, out = torch.randn(1, 8), torch.zeros(1, 14)
    lora.plan(context)
    lora.expand(lora.shrink(x, SITE, context), SITE, out, context)
    pages.pool.mul_(-1)  # both factors, so only the scale tells
    pages.scale.mul_(2)
    pages.versions[1] += 1
    again = torch.zeros(1, 14)
    lora.plan(context)
    lora.expand(lora.shrink(x, SITE, context), SITE, again, context)
    torch.testing.assert_close(again, 2 * out)


def attend_by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """One sequence: q [Q, H, C] are the last of the tokens in k and v [L, G, C]."""
    Q, H, C = q.shape
    L, G, _ = k.shape
    out = torch.zeros(Q, H, C)
    for i in range(Q):
        last = L - Q + i
        first = 0 if window is None else max(0, last - window + 1)
        for h in range(H):
            g = h // (H // G)
            weights = (k[first : last + 1, g] @ q[i, h] / math.sqrt(C)).softmax(0)
            out[i, h] = weights @ v[first : last + 1, g]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (6, 1)])
def test_attention_equals_a_loop(window: int | None, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    H, G = heads
    query_lens, context_lens = (1, 1, 1, 5, 7, 3), (1, 9, 4, 5, 11, 8)
    blocks = iter(torch.randperm(40)[:30] + 1)
    table = torch.zeros(6, 3, dtype=torch.int32)
    for row, length in enumerate(context_lens):
        for place in range(-(-length // 4)):
            table[row, place] = next(blocks)
    k_cache, v_cache = torch.randn(50, 4, G, 8), torch.randn(50, 4, G, 8)
    q = torch.randn(sum(query_lens), H, 8)
    context = make_context((0,) * 6, query_lens, context_lens, table)
    attention = ReferenceAttention()
    attention.plan(context)
    got = attention.attend(q, k_cache, v_cache, window, context)
    first = 0
    for row, (queries, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        k, v = (cache[table[row].long()].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        want = attend_by_hand(q[first : first + queries], k, v, window)
        torch.testing.assert_close(got[first : first + queries], want, rtol=1e-5, atol=1e-5)
        first += queries


def test_decodes_that_go_on_read_what_they_kept() -> None:
    """Kept keys and values, extended step by step past a regathering, equal those read anew from the pages."""
    torch.manual_seed(0)
    k_cache, v_cache = torch.zeros(30, 4, 2, 8), torch.zeros(30, 4, 2, 8)
    table = torch.arange(1, 25, dtype=torch.int32).view(2, 12)
    ops, kept, fresh = ReferenceOps(), ReferenceAttention(), ReferenceAttention()
    for step in range(30):
        context = make_context((0, 0), (1, 1), (step + 1, step + 9), table)
        context.decodes_go_on = step > 0
        if step == 0:
            k_cache.normal_()
            v_cache.normal_()
        ops.store_kv(torch.randn(2, 2, 8), torch.randn(2, 2, 8), k_cache, v_cache, context.kv_slots_T)
        q = torch.randn(2, 4, 8)
        kept.plan(context)
        got = kept.attend(q, k_cache, v_cache, None, context)
        context.decodes_go_on = False
        fresh.plan(context)
        torch.testing.assert_close(got, fresh.attend(q, k_cache, v_cache, None, context))


def test_small_operations() -> None:
    ops = ReferenceOps()
    x, weight = torch.randn(5, 8), torch.rand(8)
    want = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), want)
    residual = torch.randn(5, 8)
    total = residual + x
    torch.testing.assert_close(ops.add_rms_norm(x, residual, weight, 1e-6), ops.rms_norm(total, weight, 1e-6))
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(ops.silu_mul(x), x[:, :4] * x[:, :4].sigmoid() * x[:, 4:])
    half = ops.rms_norm(x.half(), weight.half(), 1e-6)
    torch.testing.assert_close(half.float(), want, rtol=5e-3, atol=5e-3)


def test_rotation_keeps_length_and_depends_on_distance_only() -> None:
    ops = ReferenceOps()
    angles = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.1]))
    angles = torch.cat((angles, angles), 1)
    x = torch.randn(1, 1, 4).expand(6, 2, 4).contiguous()
    before = x.clone()
    ops.rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(x.norm(dim=-1), before.norm(dim=-1))
    torch.testing.assert_close((x[1] * x[0]).sum(-1), (x[5] * x[4]).sum(-1))
    assert not torch.allclose(x[5], before[5])
