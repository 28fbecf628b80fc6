"""Adapters on a CPU against a loop written out, of any popularity."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inlaid.kernels.backend import AdapterPages, Site
from inlaid.kernels.cpu_lora import CpuLora
from inlaid.kernels.native_lora import NativeLora
from tests.examples import examples
from tests.kernels.steps import MEMORY, make_step

SITES = 14
SITE = Site(0, (6, 4, 4))
WAYS: dict[str, Callable[[AdapterPages], CpuLora]] = {
    "stacked": lambda pages: CpuLora(pages, -1),
    "side by side": lambda pages: CpuLora(pages, 1 << 30),
    "native": NativeLora,
}
every_way = pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)


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


@every_way
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=4, max_size=4),
)
@examples(40)
def test_adapters_equal_a_loop_over_rows(
    make: Callable[[AdapterPages], CpuLora], sequences: list[tuple[int, int]], ranks: list[list[int]]
) -> None:
    sequences.sort(key=lambda pair: pair[1] > 1)
    slots, lens = tuple(slot for slot, _ in sequences), tuple(length for _, length in sequences)
    pages = make_pages([[0, 0, 0], *ranks], inputs=8)
    lora = make(pages)
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


@every_way
def test_a_product_with_anothers_adapter_may_overflow(make: Callable[[AdapterPages], CpuLora]) -> None:
    """Side by side every row meets every adapter's A; what it is not meant for must not reach it, however large."""
    pages = make_pages([[0, 0, 0], [2, 1, 3], [1, 2, 2]], inputs=8)
    lora, step = make(pages), make_step((1, 2), (1, 1))
    alone, alone_step = make(pages), make_step((2,), (1,))
    x, want, got = torch.randn(2, 8), torch.zeros(1, 14), torch.zeros(2, 14)
    alone.plan(alone_step)
    alone.expand(alone.shrink(x[1:], SITE, alone_step, MEMORY, False), want, alone_step)
    offset, _, rank = pages.table[1, SITE.first].tolist()
    pages.pool[offset : offset + rank * 8] = 3e38
    pages.versions[1] += 1
    lora.plan(step)
    lora.expand(lora.shrink(x * 10, SITE, step, MEMORY, False), got, step)
    torch.testing.assert_close(got[1:], 10 * want)


@every_way
def test_changed_slots_are_read_again(make: Callable[[AdapterPages], CpuLora]) -> None:
    pages = make_pages([[0, 0, 0], [2, 1, 3]], inputs=8)
    lora, step = make(pages), make_step((1,), (1,))
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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rank", [1, 8, 13, 16, 40, 64])
@pytest.mark.parametrize("inputs", [24, 37, 256])
def test_ranks_and_widths_that_no_vector_divides(inputs: int, rank: int, threads: int) -> None:
    """Runs of one row, of a few, and of many, beside each other."""
    site = Site(7, (20, 33, 16))
    pages = AdapterPages(
        torch.randn(4 * 3 * 64 * (inputs + 33)),
        torch.zeros(4, SITES, 3, dtype=torch.int64),
        torch.rand(4, SITES),
        [0] * 4,
    )
    end = 0
    for slot in (1, 2, 3):
        for sibling, width in enumerate(site.widths):
            own = rank + slot - 1
            pages.table[slot, site.first + sibling] = torch.tensor((end, end + own * inputs, own))
            end += own * (inputs + width)
    sequences = ((3, 1), (1, 1), (1, 1), (0, 2), (2, 21), (3, 3))
    step = make_step(tuple(slot for slot, _ in sequences), tuple(length for _, length in sequences))
    rows = [slot for slot, length in sequences for _ in range(length)]
    x, out = torch.randn(len(rows), inputs), torch.randn(len(rows), sum(site.widths))
    want, got = out.double(), out.clone()
    for row, slot in enumerate(rows):
        start = 0
        for sibling, width in enumerate(site.widths):
            a_start, b_start, own = pages.table[slot, site.first + sibling].tolist()
            a = pages.pool[a_start : a_start + own * inputs].view(own, inputs).double()
            b = pages.pool[b_start : b_start + own * width].view(width, own).double()
            scale = pages.scale[slot, site.first + sibling].double()
            want[row, start : start + width] += scale * (b @ (a @ x[row].double()))
            start += width
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lora = NativeLora(pages)
        lora.plan(step)
        lora.expand(lora.shrink(x, site, step, MEMORY, False), got, step)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@every_way
def test_an_adapter_that_arrives_after_the_plan_is_as_large_as_it_is(make: Callable[[AdapterPages], CpuLora]) -> None:
    """Adapters come layer by layer while a step is under way: nothing that depends on their ranks may be older."""
    pages = make_pages([[0, 0, 0], [40, 40, 40]], inputs=8)
    entries, pages.table[1] = pages.table[1].clone(), 0
    lora, step = make(pages), make_step((1, 1), (1, 6))
    lora.plan(step)
    pages.table[1] = entries
    x, out = torch.randn(7, 8), torch.randn(7, 14)
    got = out.clone()
    lora.expand(lora.shrink(x, SITE, step, MEMORY, False), got, step)
    torch.testing.assert_close(got, by_hand(pages, x, [1] * 7, out), rtol=1e-4, atol=1e-4)
