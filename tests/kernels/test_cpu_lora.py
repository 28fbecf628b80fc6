"""Adapters on a CPU against a loop written out, of any popularity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inlaid.kernels.backend import AdapterPages, Site
from inlaid.kernels.cpu_lora import CpuLora
from tests.kernels.steps import MEMORY, make_step

SITES = 14
SITE = Site(0, (6, 4, 4))
either_way = pytest.mark.parametrize("side_by_side", [-1, 1 << 30])


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
    lora = CpuLora(pages, side_by_side)
    step = make_step(slots, lens)
    x, out = torch.randn(sum(lens), 8), torch.randn(sum(lens), 14)
    rows = [slot for slot, length in sequences for _ in range(length)]
    want = by_hand(pages, x, rows, out)
    for _ in range(2):  # the second time from what was stacked
        got = out.clone()
        lora.plan(step)
        if step.adapters:
            lora.expand(lora.shrink(x, SITE, step, MEMORY, False), got, step)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@either_way
def test_a_product_with_anothers_adapter_may_overflow(side_by_side: int) -> None:
    """Side by side every row meets every adapter's A; what it is not meant for must not reach it, however large."""
    pages = make_pages([[0, 0, 0], [2, 1, 3], [1, 2, 2]], inputs=8)
    lora, step = CpuLora(pages, side_by_side), make_step((1, 2), (1, 1))
    alone, alone_step = CpuLora(pages, -1), make_step((2,), (1,))
    x, want, got = torch.randn(2, 8), torch.zeros(1, 14), torch.zeros(2, 14)
    alone.plan(alone_step)
    alone.expand(alone.shrink(x[1:], SITE, alone_step, MEMORY, False), want, alone_step)
    offset, _, rank = pages.table[1, SITE.first].tolist()
    pages.pool[offset : offset + rank * 8] = 3e38
    pages.versions[1] += 1
    lora.plan(step)
    lora.expand(lora.shrink(x * 10, SITE, step, MEMORY, False), got, step)
    torch.testing.assert_close(got[1:], 10 * want)


@either_way
def test_changed_slots_are_read_again(side_by_side: int) -> None:
    pages = make_pages([[0, 0, 0], [2, 1, 3]], inputs=8)
    lora, step = CpuLora(pages, side_by_side), make_step((1,), (1,))
    x, out = torch.randn(1, 8), torch.zeros(1, 14)
    lora.plan(step)
    lora.expand(lora.shrink(x, SITE, step, MEMORY, False), out, step)
    pages.pool.mul_(-1)  # both factors, so only the scale tells
    pages.scale.mul_(2)
    pages.versions[1] += 1
    again = torch.zeros(1, 14)
    lora.plan(step)
    lora.expand(lora.shrink(x, SITE, step, MEMORY, False), again, step)
    torch.testing.assert_close(again, 2 * out)
