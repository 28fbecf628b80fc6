"""Keys and values of 8 bits on a CPU, against the specification: codes, the write after the rotation, attention."""

from __future__ import annotations

import math

import pytest
import torch

from inlaid.kernels import kv_codes, library, spec
from inlaid.kernels.backend import HeadNorms, LayerCache, Product
from inlaid.kernels.cpu import CpuOps
from inlaid.kernels.cpu_attention import CpuAttention
from inlaid.kernels.packed import PackedAttention, PackedOps
from tests.kernels.kv_caches import CODES, close, coded, zeros
from tests.kernels.steps import MEMORY, make_step


def needs_compiler(kind: type[object]) -> None:
    if kind in (PackedAttention, PackedOps) and library.c_compiler() is None:
        pytest.skip("no C compiler here: apt install gcc")


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("magnitude", [1.0, 3e4, 1e-3, 1e-9, 0.0, 3e7])
def test_codes_and_scales_are_the_specifications(dtype: torch.dtype, magnitude: float) -> None:
    """Numbers too small or too large for a scale in half precision included."""
    torch.manual_seed(0)
    x = torch.randn(6, 2, 16) * magnitude
    codes, scales = kv_codes.quantize(x, dtype)
    for t in range(6):
        for g in range(2):
            want, scale = spec.kv_codes(x[t, g], dtype)
            assert torch.equal(codes[t, g].view(torch.int8), want.view(torch.int8))
            assert torch.equal(scales[t, g], scale)
    back = codes.float() * scales.float()[..., None]
    if 1e-5 < magnitude < 1e7:
        error = (back - x).norm() / x.norm()
        assert error < (0.008 if dtype == torch.int8 else 0.04), f"{error:.4f}"


@pytest.mark.parametrize("dtype", CODES)
def test_numbers_that_are_not_finite_have_no_scale(dtype: torch.dtype) -> None:
    x = torch.ones(3, 1, 8)
    x[0, 0, 3], x[1, 0, 0] = math.nan, -math.inf
    _, scales = kv_codes.quantize(x, dtype)
    assert scales.isnan().flatten().tolist() == [True, True, False]
    assert spec.kv_codes(x[0, 0], dtype)[1].isnan()


@pytest.mark.parametrize("kind", [CpuOps, PackedOps])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("with_norms", [False, True])
def test_rope_store(kind: type[CpuOps], dtype: torch.dtype, with_norms: bool) -> None:
    needs_compiler(kind)
    torch.manual_seed(0)
    H, G, C = 4, 2, 16
    table = torch.arange(1, 7, dtype=torch.int32).view(2, 3)
    step = make_step((0, 0), (1, 3), (9, 3), table)
    angles = torch.outer(torch.arange(12.0), 10.0 ** -torch.arange(C // 2)).repeat(1, 2)
    ops, qkv = kind(), torch.randn(4, (H + 2 * G) * C)
    norms = HeadNorms(torch.rand(C), torch.rand(C), 1e-6) if with_norms else None
    looked_up, cache, want = ops.angles(angles.cos(), angles.sin(), step), *(zeros(8, 4, G, C, dtype) for _ in "ab")
    q = spec.rope_store(
        qkv, *looked_up, want.keys, want.values, step.kv_slots_T.tolist(),
        None if norms is None else (norms.q_weight_C, norms.k_weight_C, norms.eps), want.scales,
    )  # fmt: skip
    got = ops.rope_store(Product(qkv), looked_up, cache, H, norms, step)
    torch.testing.assert_close(got, q)
    close(cache, want)
    assert cache.scales is not None
    assert int((cache.scales != 0).sum()) == 4 * G * 2, "four tokens, and nothing beside them"


@pytest.mark.parametrize("kind", [CpuAttention, PackedAttention])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [(4, 2, 8), (2, 2, 48), (6, 1, 40)])
def test_attention(
    kind: type[CpuAttention], dtype: torch.dtype, window: int | None, heads: tuple[int, int, int]
) -> None:
    """Decodes, whole prompts and a chunk; what is behind a context, and in no block of theirs, has no scale."""
    needs_compiler(kind)
    torch.manual_seed(0)
    H, G, C = heads
    query_lens, context_lens = (1, 1, 1, 5, 7, 3), (1, 9, 4, 5, 11, 8)
    blocks = (torch.randperm(40)[:18] + 1).int()
    table, pages = torch.zeros(6, 3, dtype=torch.int32), torch.full((2, 50, 4, G, C), math.nan)
    pages[:, 0] = 0  # padding reads the scratch block
    used = 0
    for row, length in enumerate(context_lens):
        for token in range(length):
            table[row, token // 4] = blocks[used + token // 4]
            pages[:, table[row, token // 4], token % 4] = torch.randn(2, G, C)
        used += -(-length // 4)
    cache = coded(pages[0], pages[1], dtype)
    q = torch.randn(sum(query_lens), H, C)
    step, attention = make_step((0,) * 6, query_lens, context_lens, table), kind()
    attention.plan(step, MEMORY)
    got = attention.attend(q, cache, window, step, MEMORY).view(q.shape)
    want = spec.attention(q, cache.keys, cache.values, table, query_lens, context_lens, window, cache.scales)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", CODES)
def test_decodes_that_go_on_read_what_they_kept(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.arange(1, 25, dtype=torch.int32).view(2, 12)
    cache: LayerCache = coded(torch.randn(30, 4, 2, 8), torch.randn(30, 4, 2, 8), dtype)
    kept, fresh = CpuAttention(), CpuAttention()
    for number in range(12):
        step = make_step((0, 0), (1, 1), (number + 1, number + 9), table, decodes_go_on=number > 0)
        anew = make_step((0, 0), (1, 1), (number + 1, number + 9), table)
        kv_codes.write(cache, step.kv_slots_T, torch.randn(2, 2, 8), torch.randn(2, 2, 8))
        q = torch.randn(2, 4, 8)
        kept.plan(step, MEMORY)
        fresh.plan(anew, MEMORY)
        got = kept.attend(q, cache, None, step, MEMORY)
        torch.testing.assert_close(got, fresh.attend(q, cache, None, anew, MEMORY))


@pytest.mark.parametrize("dtype", CODES)
def test_drafts_that_are_taken_back_leave_nothing_behind(dtype: torch.dtype) -> None:
    """Steps of guesses, of which some are written again, beside a prompt."""
    torch.manual_seed(0)
    table = torch.arange(1, 37, dtype=torch.int32).view(3, 12)
    cache, attention, starts = coded(*torch.randn(2, 40, 4, 2, 8), dtype), CpuAttention(), [3, 9]
    for number in range(6):
        lens = (1 + number % 3, 1 + (number * 2) % 4, 5)
        context_lens = (starts[0] + lens[0], starts[1] + lens[1], 7)
        step = make_step((0, 0, 0), lens, context_lens, table, decodes_go_on=number > 0, num_drafted=2)
        kv_codes.write(cache, step.kv_slots_T, *torch.randn(2, sum(lens), 2, 8))
        q = torch.randn(sum(lens), 4, 8)
        attention.plan(step, MEMORY)
        got = attention.attend(q, cache, None, step, MEMORY).view(q.shape)
        want = spec.attention(q, cache.keys, cache.values, table, lens, context_lens, None, cache.scales)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        starts = [start + 1 + (number + row) % length for row, (start, length) in enumerate(zip(starts, lens[:2]))]
