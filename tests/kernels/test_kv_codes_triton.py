"""Keys and values of 8 bits in Triton, against the specification: decode, prefill, few queries, and the fused write."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from inlaid.kernels import attention_triton as attention
from inlaid.kernels import fused_triton as fused
from inlaid.kernels import spec
from inlaid.kernels.backend import HeadNorms, LayerCache
from inlaid.kernels.verify_triton import MAX_QUERIES, verify
from tests.cases import spread
from tests.kernels.kv_caches import CODES, close, coded, zeros
from tests.kernels.test_attention_triton import DEVICE, check, paged
from tests.kernels.test_fused_triton import Pended

SHAPES = ((2, 2, 128), (8, 2, 64), (3, 3, 48), (7, 1, 32))  # query heads, key/value heads, width


def apart(cache: LayerCache) -> LayerCache:
    """Return the same cache with other memory between the scales of blocks, as in memory shared with adapters."""
    assert cache.scales is not None
    blocks, G, P, _ = cache.scales.shape
    wide = torch.full((blocks, 3 * G, P, 2), float("nan"), dtype=torch.float16, device=cache.scales.device)
    wide[:, G : 2 * G] = cache.scales
    return cache._replace(scales=wide[:, G : 2 * G])


def random_pages(lengths: list[int], kv_heads: int, width: int, dtype: torch.dtype) -> tuple[LayerCache, torch.Tensor]:
    """Return codes, without scales wherever no token lives, and block tables."""
    k_cache, v_cache, tables = paged(lengths, kv_heads, width)
    return apart(coded(k_cache * 3, v_cache * 0.2, dtype)), tables


def expected(
    q: torch.Tensor, cache: LayerCache, tables: torch.Tensor, queries: list[int], lengths: list[int], window: int
) -> torch.Tensor:
    return spec.attention(q, cache.keys, cache.values, tables, queries, lengths, window or None, cache.scales)


@pytest.mark.parametrize(
    ("dtype", "splits", "shape", "window"),
    spread(
        ((*first, shape, window) for first in product(CODES, (1, 4)) for shape in SHAPES for window in (0, 40)),
        every=7,
    ),
)
def test_decode(dtype: torch.dtype, splits: int, shape: tuple[int, int, int], window: int) -> None:
    heads, kv_heads, width = shape
    lengths = [1, 17, 64, 131]
    cache, tables = random_pages(lengths, kv_heads, width, dtype)
    q = torch.randn(4, heads, width).half().to(DEVICE)
    out = torch.full_like(q, float("nan"))
    scratch = attention.decode_scratch(4, heads, width, splits, DEVICE)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    attention.decode(q, *cache[:2], tables, on_device, out, scratch, splits, window, scales=cache.scales)
    check(out, expected(q, cache, tables, [1] * 4, lengths, window))


@pytest.mark.parametrize(("dtype", "kv_heads"), [(CODES[0], 2), (CODES[1], 1)])
def test_other_tiles(dtype: torch.dtype, kv_heads: int) -> None:
    """Without a pipeline, the next pages are asked for by hand."""
    lengths = [30, 64]
    cache, tables = random_pages(lengths, kv_heads, 64, dtype)
    q = torch.randn(2, 2, 64).half().to(DEVICE)
    out = torch.full_like(q, float("nan"))
    on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    scratch = attention.decode_scratch(2, 2, 64, 1, DEVICE)
    attention.decode(q, *cache[:2], tables, on_device, out, scratch, 1, tile=(32, 4, 1), scales=cache.scales)
    check(out, expected(q, cache, tables, [1, 1], lengths, 0))


@pytest.mark.parametrize(("dtype", "shape", "window"), [(CODES[0], (2, 2, 64), 30), (CODES[1], (4, 1, 48), 0)])
def test_prefill_of_chunks(dtype: torch.dtype, shape: tuple[int, int, int], window: int) -> None:
    """A whole prompt, and the second chunk of a longer one."""
    heads, kv_heads, width = shape
    lengths, queries = [70, 90], [70, 21]
    cache, tables = random_pages(lengths, kv_heads, width, dtype)
    q = torch.randn(sum(queries), heads, width).half().to(DEVICE)
    out = torch.full_like(q, float("nan"))
    tiles = torch.tensor(attention.query_tiles(tuple(queries), 0), dtype=torch.int32).T.contiguous().to(DEVICE)
    starts = torch.tensor([0, 70, 91], dtype=torch.int32, device=DEVICE)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    attention.prefill(q, *cache[:2], tables, on_device, starts, tiles, out, window, scales=cache.scales)
    check(out, expected(q, cache, tables, queries, lengths, window))


@pytest.mark.parametrize(("dtype", "shape", "window"), [(CODES[0], (4, 1, 64), 30), (CODES[1], (2, 2, 32), 0)])
def test_few_queries(dtype: torch.dtype, shape: tuple[int, int, int], window: int) -> None:
    """A decode, and drafts of two lengths."""
    heads, kv_heads, width = shape
    lengths, queries = [70, 130, 33], [1, 9, MAX_QUERIES]
    cache, tables = random_pages(lengths, kv_heads, width, dtype)
    starts = torch.tensor([0, 1, 10, 10 + MAX_QUERIES], dtype=torch.int32, device=DEVICE)
    q = torch.randn(sum(queries), heads, width).half().to(DEVICE)
    out = torch.full_like(q, float("nan"))
    size = q.shape[0] * heads * 4
    scratch = torch.empty(size * width, device=DEVICE), torch.empty(size * 2, device=DEVICE)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    verify(q, *cache[:2], tables, on_device, starts, out, scratch, 4, MAX_QUERIES, window, scales=cache.scales)
    check(out, expected(q, cache, tables, queries, lengths, window))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (8, 1, 128), (3, 3, 48)])
@pytest.mark.parametrize("with_norms", [False, True])
def test_rope_and_store(dtype: torch.dtype, heads: int, kv_heads: int, width: int, with_norms: bool) -> None:
    torch.manual_seed(0)
    tokens, total = 5, heads + 2 * kv_heads
    qkv = torch.randn(tokens, total * width).half().to(DEVICE)
    qkv[:, -width:] *= 1e-3  # heads have scales of their own
    angles = torch.outer(torch.arange(40.0), torch.rand(width // 2)).repeat(1, 2).to(DEVICE)
    cos, sin = angles.cos().half(), angles.sin().half()
    positions = torch.tensor([0, 39, 3, 3, 17], dtype=torch.int64, device=DEVICE)
    slots = torch.tensor([21, 5, 30, 16, 0], dtype=torch.int64, device=DEVICE)
    got, want = apart(zeros(2, 16, kv_heads, width, dtype, DEVICE)), zeros(2, 16, kv_heads, width, dtype, DEVICE)
    norms = HeadNorms(*(torch.randn(width).half().to(DEVICE) for _ in "qk"), 1e-5) if with_norms else None
    weights = (norms.q_weight_C, norms.k_weight_C, 1e-5) if norms else None
    spec.rope_store(qkv, cos[positions], sin[positions], *want[:2], slots.tolist(), weights, want.scales)
    fused.rope_store(qkv, positions, slots, cos, sin, *got[:2], heads, norms, scales=got.scales)
    close(got, want)
    assert torch.equal(got.values.view(torch.int8), want.values.view(torch.int8)), "values are only rounded"
    assert int((got.scales != 0).sum()) == tokens * kv_heads * 2


@pytest.mark.parametrize("dtype", CODES)
def test_rope_adds_what_is_pending(dtype: torch.dtype) -> None:
    heads, kv_heads, width = 4, 2, 64
    pended = Pended((heads * width, kv_heads * width, kv_heads * width))
    y, expanded = pended.split(5)
    angles = torch.outer(torch.arange(9.0), torch.rand(width // 2)).repeat(1, 2).to(DEVICE)
    cos, sin = angles.cos().half(), angles.sin().half()
    positions = torch.tensor([0, 8, 3, 3, 7], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([21, 5, 30, 16, 0], dtype=torch.int32, device=DEVICE)
    first, second = (zeros(2, 16, kv_heads, width, dtype, DEVICE) for _ in "ab")
    fused.rope_store(y, positions, slots, cos, sin, *first[:2], heads, pending=pended.pending, scales=first.scales)
    fused.rope_store(expanded, positions, slots, cos, sin, *second[:2], heads, scales=second.scales)
    close(first, second)


@pytest.mark.parametrize("dtype", CODES)
def test_a_number_that_is_not_finite_leaves_no_scale(dtype: torch.dtype) -> None:
    qkv = torch.ones(2, 3 * 32).half().to(DEVICE)
    qkv[0, 40], qkv[1, 70] = float("inf"), float("nan")
    table, at = torch.ones(4, 32).half().to(DEVICE), torch.tensor([0, 1], dtype=torch.int64, device=DEVICE)
    cache = zeros(2, 16, 1, 32, dtype, DEVICE)
    fused.rope_store(qkv, at, at, table, table, *cache[:2], 1, scales=cache.scales)
    assert cache.scales is not None
    assert cache.scales[0, 0, :2].isnan().tolist() == [[True, False], [False, True]]
