"""The adapter kernels against the specification, over popularity of adapters and mixed ranks (in Triton's interpreter
where there is no GPU)."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from inlaid.kernels import lora_triton as lora  # noqa: E402
from inlaid.kernels import spec  # noqa: E402
from inlaid.kernels.backend import AdapterPages, Site  # noqa: E402
from tests.cases import spread  # noqa: E402
from tests.examples import examples  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SITES = 7


def make_adapters(
    ranks: list[int], k: int, widths: tuple[int, ...], site: int, dtype: torch.dtype = torch.float16
) -> AdapterPages:
    """Slot 0 is empty; slot i + 1 has ranks[i] at `site` and its siblings, with a gap before every matrix."""
    generator = torch.Generator().manual_seed(len(ranks) + k)
    pieces, table = [], torch.zeros(len(ranks) + 1, SITES, 3, dtype=torch.int64)
    scale = torch.zeros(len(ranks) + 1, SITES)
    offset = 0

    def place(matrix: torch.Tensor) -> int:
        nonlocal offset
        gap = lora.OFFSET_ALIGNMENT - (offset + matrix.numel()) % lora.OFFSET_ALIGNMENT
        pieces.extend([matrix.flatten(), torch.full((gap,), float("nan"))])
        offset += matrix.numel() + gap
        return offset - matrix.numel() - gap

    for slot, rank in enumerate(ranks, start=1):
        for sibling, n in enumerate(widths):
            a = torch.randn(rank, k, generator=generator) * k**-0.5
            b = torch.randn(n, rank, generator=generator) * max(rank, 1) ** -0.5
            table[slot, site + sibling] = torch.tensor([place(a), place(b), rank])
            scale[slot, site + sibling] = 0.5 + slot / 7 + sibling
    pool = torch.cat([*pieces, torch.full((64,), float("nan"))]).to(dtype)
    return AdapterPages(pool.to(DEVICE), table.to(DEVICE), scale.to(DEVICE), [1] * (len(ranks) + 1))


def expected_of(
    x: torch.Tensor,
    y: torch.Tensor,
    slots: np.ndarray,
    adapters: AdapterPages,
    site: int,
    widths: tuple[int, ...],
) -> torch.Tensor:
    return spec.lora(x, y, slots.tolist(), adapters, Site(site, widths))


def run(
    x: torch.Tensor,
    slots: np.ndarray,
    adapters: AdapterPages,
    site: int,
    widths: tuple[int, ...],
    max_rank: int,
    block_rows: int = 16,
    tuning: lora.Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = len(slots)
    tuning = tuning or lora.Tuning(parts=2, block_k=32, block_n=32)
    plan = lora.plan_rows(slots, lora.max_segments(rows, adapters.table.shape[0], block_rows), block_rows, DEVICE)
    partial = lora.scratch(rows, max_rank, tuning.parts, DEVICE)
    partial.fill_(float("nan"))  # what nothing wrote must not be read
    y = torch.randn(rows, sum(widths), generator=torch.Generator().manual_seed(7)).to(x)
    before = y.clone()
    lora.shrink(x, adapters, plan, partial, Site(site, widths), tuning)
    lora.expand_add(partial, adapters, plan, y, Site(site, widths), tuning)
    return y, before


def check(y: torch.Tensor, expected: torch.Tensor, limit: float = 2e-3) -> None:
    error = (y.float() - expected).norm() / expected.norm()
    assert torch.isfinite(y).all()
    assert error < limit, f"relative error {error:.2e}"


def popularity(kind: str, rows: int, adapters: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    if kind == "distinct":
        return (np.arange(rows) % adapters + 1).astype(np.int32)
    if kind == "uniform":
        return rng.integers(0, adapters + 1, rows).astype(np.int32)
    if kind == "zipf":
        return np.minimum(rng.zipf(1.5, rows) - 1, adapters).astype(np.int32)
    if kind == "identical":
        return np.full(rows, 2, np.int32)
    return np.where(rng.random(rows) < 0.9, 1, rng.integers(0, adapters + 1, rows)).astype(np.int32)  # skewed


@pytest.mark.parametrize(
    ("kind", "rows"),
    spread(product(("distinct", "uniform", "zipf", "identical", "skewed"), (1, 5, 33)), every=2),
)
def test_popularity(kind: str, rows: int) -> None:
    widths = (64, 32, 32)
    adapters = make_adapters([16, 8, 16, 3, 0, 24], 96, widths, site=0)
    slots = popularity(kind, rows, 6)
    x = torch.randn(rows, 96).half().to(DEVICE)
    y, before = run(x, slots, adapters, 0, widths, max_rank=24)
    check(y, expected_of(x, before, slots, adapters, 0, widths))
    assert torch.equal(y[slots == 0], before[slots == 0])


@pytest.mark.parametrize("rank", spread(((rank,) for rank in (1, 2, 7, 8, 16, 64, 100, 256)), every=2))
def test_any_rank_beside_any_other(rank: int) -> None:
    widths = (48,)
    adapters = make_adapters([rank, 1, 256, 8], 64, widths, site=3)
    slots = np.array([1, 2, 3, 4, 1, 0, 1, 3], np.int32)
    x = torch.randn(8, 64).half().to(DEVICE)
    y, before = run(x, slots, adapters, 3, widths, max_rank=256)
    check(y, expected_of(x, before, slots, adapters, 3, widths))


@pytest.mark.parametrize(("block_r", "shares"), [(32, 1), (32, 2), (16, 3)])
def test_ranks_divided_among_programs(block_r: int, shares: int) -> None:
    widths = (48, 16)
    adapters = make_adapters([70, 16, 33, 128], 64, widths, site=0)
    slots = np.array([1, 2, 3, 4, 0, 1], np.int32)
    x = torch.randn(6, 64).half().to(DEVICE)
    tuning = lora.Tuning(parts=2, block_k=32, block_n=32, block_r=block_r, shares=shares)
    y, before = run(x, slots, adapters, 0, widths, max_rank=128, tuning=tuning)
    check(y, expected_of(x, before, slots, adapters, 0, widths))


def test_more_than_a_hundred_adapters_in_a_batch() -> None:
    widths = (32,)
    adapters = make_adapters([1 + i % 9 for i in range(110)], 32, widths, site=4)
    slots = np.random.default_rng(0).permutation(110).astype(np.int32) + 1
    x = torch.randn(110, 32).half().to(DEVICE)
    tuning = lora.Tuning(parts=1, block_k=32, block_n=32)
    y, before = run(x, slots, adapters, 4, widths, max_rank=16, tuning=tuning)
    check(y, expected_of(x, before, slots, adapters, 4, widths))


BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies bfloat16 as integers"),
)


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
def test_prefill_blocks(dtype: torch.dtype) -> None:
    widths = (64,)
    adapters = make_adapters([16, 5], 64, widths, site=6, dtype=dtype)
    slots = np.repeat(np.array([1, 0, 2, 1], np.int32), [70, 3, 41, 20])
    x = torch.randn(len(slots), 64).to(dtype).to(DEVICE)
    tuning = lora.Tuning(parts=2, block_k=32, block_n=64)
    y, before = run(x, slots, adapters, 6, widths, max_rank=16, block_rows=64, tuning=tuning)
    check(y, expected_of(x, before, slots, adapters, 6, widths), limit=2e-3 if dtype == torch.float16 else 1e-2)


def test_inner_values_beyond_half_precision() -> None:
    """x A^T exceeds 65504 here; the product with a small B does not."""
    widths = (32,)
    adapters = make_adapters([16], 64, widths, site=0)
    a_at, b_at, rank = adapters.table[1, 0].tolist()
    adapters.pool[a_at : a_at + rank * 64] = 10.0
    adapters.pool[b_at : b_at + rank * 32] *= 1e-3
    x = torch.full((3, 64), 300.0).half().to(DEVICE)
    slots = np.array([1, 1, 0], np.int32)
    y, before = run(x, slots, adapters, 0, widths, max_rank=16)
    check(y, expected_of(x, before, slots, adapters, 0, widths))


def test_row_does_not_depend_on_its_neighbours() -> None:
    widths = (64,)
    adapters = make_adapters([16, 32], 64, widths, site=0)
    x = torch.randn(20, 64).half().to(DEVICE)
    together, _ = run(x, np.array([1, 2] * 10, np.int32), adapters, 0, widths, max_rank=32)
    alone, _ = run(x[:1], np.array([1], np.int32), adapters, 0, widths, max_rank=32)
    assert torch.equal(together[0], alone[0])


@examples(60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=90), st.sampled_from([16, 32]))
def test_segments_cover_each_adapted_row_once(slots: list[int], block: int) -> None:
    array = np.array(slots, np.int32)
    order, segments = lora.cut(array, block)
    seen = []
    for start, length, slot in segments.T.tolist():
        assert 0 < length <= block
        rows = order[start : start + length]
        assert (array[rows] == slot).all()
        assert slot != 0
        seen.extend(rows.tolist())
    assert sorted(seen) == np.flatnonzero(array).tolist()
    assert segments.shape[1] <= lora.max_segments(len(slots), 10, block)


def test_plan_refuses_more_rows_than_it_holds() -> None:
    with pytest.raises(ValueError, match="5 rows"):
        lora.write_segments(np.ones(5, np.int32), np.zeros(12, np.int32), np.zeros(4, np.int32), 16)
