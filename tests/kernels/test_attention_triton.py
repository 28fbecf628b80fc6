"""Paged attention in Triton against the specification: decode and prefill, grouped queries, head widths, windows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from inlaid.kernels import attention_triton as attention
from inlaid.kernels import spec
from tests.cases import spread

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16


def paged(lengths: list[int], kv_heads: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return caches with NaN wherever no token lives, and the block tables that lead to the tokens."""
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    pages = [-(-length // PAGE) for length in lengths]
    blocks = torch.randperm(sum(pages) + 3, generator=generator)[: sum(pages)] + 1
    tables = torch.zeros(len(lengths), max(pages) + 2, dtype=torch.int32)
    caches = torch.full((2, sum(pages) + 4, PAGE, kv_heads, width), float("nan"), dtype=torch.float16)
    used = 0
    for s, length in enumerate(lengths):
        tables[s, : pages[s]] = blocks[used : used + pages[s]].int()
        for t in range(length):
            block = int(blocks[used + t // PAGE])
            caches[:, block, t % PAGE] = torch.randn(2, kv_heads, width, generator=generator).half()
        used += pages[s]
    return caches[0].to(DEVICE), caches[1].to(DEVICE), tables.to(DEVICE)


def expected_of(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, table: torch.Tensor, length: int, window: int
) -> torch.Tensor:
    """Return the specification's attention of the last len(q) tokens of one sequence."""
    return spec.attention(q, k_cache, v_cache, table[None], [len(q)], [length], window or None)


def check(out: torch.Tensor, expected: torch.Tensor) -> None:
    error = (out.float() - expected).norm() / expected.norm()
    assert torch.isfinite(out).all()
    assert error < 2e-3, f"relative error {error:.2e}"


@pytest.mark.parametrize(
    ("splits", "heads", "kv_heads", "width", "window"),
    spread(
        (
            (splits, *shape, window)
            for splits in (1, 4, 16)
            for shape in [(2, 2, 128), (8, 2, 64), (3, 3, 48), (7, 1, 32)]
            for window in (0, 40)
        ),
        every=5,
    ),
)
def test_decode(splits: int, heads: int, kv_heads: int, width: int, window: int) -> None:
    lengths = [1, 17, 64, 131]
    k_cache, v_cache, tables = paged(lengths, kv_heads, width)
    q = torch.randn(4, heads, width).half().to(DEVICE)
    out = torch.full_like(q, float("nan"))
    scratch = attention.decode_scratch(4, heads, width, splits, DEVICE)
    for part in scratch:
        part.fill_(float("nan"))
    on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    attention.decode(q, k_cache, v_cache, tables, on_device, out, scratch, splits, window)
    expected = [expected_of(q[i : i + 1], k_cache, v_cache, tables[i], n, window) for i, n in enumerate(lengths)]
    check(out, torch.cat(expected))


@pytest.mark.parametrize("tile", [(32, 4, 1), (32, 4, 3), (64, 8, 2)])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_decode_in_other_tiles(tile: tuple[int, int, int], kv_heads: int) -> None:
    """Use tiles that perf/gpu times; a sequence ends within, at and after a tile."""
    lengths = [30, 64, 97]
    k_cache, v_cache, tables = paged(lengths, kv_heads, 64)
    q = torch.randn(3, 2, 64).half().to(DEVICE)
    out = torch.full_like(q, float("nan"))
    on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    scratch = attention.decode_scratch(3, 2, 64, 2, DEVICE)
    attention.decode(q, k_cache, v_cache, tables, on_device, out, scratch, 2, tile=tile)
    check(out, torch.cat([expected_of(q[i : i + 1], k_cache, v_cache, tables[i], n, 0) for i, n in enumerate(lengths)]))


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("heads", [2, 4])
def test_padding_rows_give_zeros(splits: int, heads: int) -> None:
    k_cache, v_cache, tables = paged([20, 5], 2, 64)
    q = torch.randn(2, heads, 64).half().to(DEVICE)
    out = torch.full_like(q, float("nan"))
    scratch = attention.decode_scratch(2, heads, 64, splits, DEVICE)
    attention.decode(
        q, k_cache, v_cache, tables, torch.tensor([20, 0], dtype=torch.int32, device=DEVICE), out, scratch, splits
    )
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    check(out[:1], expected_of(q[:1], k_cache, v_cache, tables[0], 20, 0))


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(2, 2, 128), (4, 1, 64)])
@pytest.mark.parametrize("window", [0, 30])
def test_prefill_of_chunks_beside_decodes(heads: int, kv_heads: int, width: int, window: int) -> None:
    """Sequence 0 decodes; 1 is a whole prompt; 2 is the second chunk of a longer one."""
    lengths, queries = [9, 70, 90], (1, 70, 21)
    k_cache, v_cache, tables = paged(lengths, kv_heads, width)
    q = torch.randn(sum(queries), heads, width).half().to(DEVICE)
    out = torch.full_like(q, float("nan"))
    tiles = torch.tensor([*attention.query_tiles(queries, 1), (-1, 0)], dtype=torch.int32).T.contiguous().to(DEVICE)
    starts = torch.tensor([0, 1, 71, 92], dtype=torch.int32, device=DEVICE)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    attention.prefill(q, k_cache, v_cache, tables, on_device, starts, tiles, out, window)
    assert torch.isnan(out[0]).all()  # not prefill's to write
    check(out[1:71], expected_of(q[1:71], k_cache, v_cache, tables[1], 70, window))
    check(out[71:], expected_of(q[71:], k_cache, v_cache, tables[2], 90, window))


def test_splits_fill_the_chip_for_small_batches_only() -> None:
    assert attention.num_splits(1, 32) == 16
    assert attention.num_splits(256, 32) == 1
    assert attention.num_splits(64, 8) == 1
    assert attention.num_splits(32, 8) == 2
