"""Attention of a few queries to each sequence against the specification: grouped queries, windows, splits, padding."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from inlaid.kernels.verify_triton import MAX_QUERIES, verify
from tests.cases import spread
from tests.kernels.test_attention_triton import DEVICE, check, expected_of, paged


@pytest.mark.parametrize(
    ("splits", "heads", "kv_heads", "width", "window"),
    spread([(4, 4, 1, 64, 30), (1, 2, 2, 128, 0), (16, 6, 2, 32, 40), (4, 2, 2, 48, 0)], every=4),
)
def test_few_queries_of_each_sequence(splits: int, heads: int, kv_heads: int, width: int, window: int) -> None:
    """A decode, drafts of several lengths, a whole short prompt, and a sequence of padding between rows of padding."""
    lengths, queries = [70, 130, 5, 33, 0], [1, 9, 5, MAX_QUERIES, 0]
    k_cache, v_cache, tables = paged(lengths, kv_heads, width)
    first = 2  # rows before the first sequence are not these kernels'
    starts = torch.tensor([first, *(first + sum(queries[: i + 1]) for i in range(5))], dtype=torch.int32, device=DEVICE)
    q = torch.randn(first + sum(queries) + 3, heads, width).half().to(DEVICE)
    out = torch.full_like(q, float("nan"))
    size = q.shape[0] * heads * splits
    scratch = (
        torch.full((size * width,), float("nan"), device=DEVICE),
        torch.full((size * 2,), float("nan"), device=DEVICE),
    )
    on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    verify(q, k_cache, v_cache, tables, on_device, starts, out, scratch, splits, MAX_QUERIES, window)
    at = first
    for sequence, (length, count) in enumerate(zip(lengths, queries)):
        if count:
            rows = slice(at, at + count)
            check(out[rows], expected_of(q[rows], k_cache, v_cache, tables[sequence], length, window))
        at += count
    assert (out[:first] == 0).all()
    assert (out[at:] == 0).all()
