"""Attention on a CPU against a loop written out, over pages."""

from __future__ import annotations

import math

import pytest
import torch

from inlaid.kernels import library
from inlaid.kernels.backend import LayerCache
from inlaid.kernels.cpu_attention import CpuAttention
from inlaid.kernels.packed import PackedAttention
from tests.kernels.steps import MEMORY, make_step


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


@pytest.mark.parametrize("kind", [CpuAttention, PackedAttention])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("heads", [(4, 2, 8), (2, 2, 48), (6, 1, 40)])
def test_attention_equals_a_loop(kind: type[CpuAttention], window: int | None, heads: tuple[int, int, int]) -> None:
    if kind is PackedAttention and library.c_compiler() is None:
        pytest.skip("no C compiler here: apt install gcc")
    torch.manual_seed(0)
    H, G, C = heads
    query_lens, context_lens = (1, 1, 1, 5, 7, 3), (1, 9, 4, 5, 11, 8)
    blocks = iter(torch.randperm(40)[:30] + 1)
    table = torch.zeros(6, 3, dtype=torch.int32)
    for row, length in enumerate(context_lens):
        for place in range(-(-length // 4)):
            table[row, place] = next(blocks)
    k_cache, v_cache = torch.randn(50, 4, G, C), torch.randn(50, 4, G, C)
    q = torch.randn(sum(query_lens), H, C)
    step = make_step((0,) * 6, query_lens, context_lens, table)
    attention = kind()
    attention.plan(step, MEMORY)
    got = attention.attend(q, LayerCache(k_cache, v_cache), window, step, MEMORY).view(q.shape)
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
    cache, kept, fresh = LayerCache(k_cache, v_cache), CpuAttention(), CpuAttention()
    for number in range(30):
        step = make_step((0, 0), (1, 1), (number + 1, number + 9), table, decodes_go_on=number > 0)
        anew = make_step((0, 0), (1, 1), (number + 1, number + 9), table)
        for pages in cache[:2]:
            if number == 0:
                pages.normal_()
            pages.view(-1, 2, 8)[step.kv_slots_T] = torch.randn(2, 2, 8)
        q = torch.randn(2, 4, 8)
        kept.plan(step, MEMORY)
        fresh.plan(anew, MEMORY)
        got = kept.attend(q, cache, None, step, MEMORY)
        torch.testing.assert_close(got, fresh.attend(q, cache, None, anew, MEMORY))


@pytest.mark.parametrize("window", [None, 3])
def test_what_a_former_owner_left_behind_a_context_is_never_multiplied(window: int | None) -> None:
    torch.manual_seed(0)
    lens = (1, 4, 6)
    table = torch.tensor([[1, 0], [2, 0], [3, 4]], dtype=torch.int32)
    clean = [torch.randn(5, 4, 2, 8) for _ in "kv"]
    dirty = [pages.clone() for pages in clean]
    for pages in (*clean, *dirty):
        pages[0] = 0.0  # the scratch block, which nobody writes on a CPU
    for pages in dirty:
        pages[1, 1:] = pages[4, 2:] = math.nan
    q, outputs = torch.randn(3, 4, 8), []
    for pages in (clean, dirty):
        step, attention = make_step((0,) * 3, (1,) * 3, lens, table), CpuAttention()
        attention.plan(step, MEMORY)
        outputs.append(attention.attend(q, LayerCache(pages[0], pages[1]), window, step, MEMORY))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("window", [None, 5])
def test_decodes_with_drafts_equal_single_tokens_and_go_on_from_what_they_kept(window: int | None) -> None:
    """Steps of guesses, of which some are taken back and written again, beside a prompt that changes nothing."""
    torch.manual_seed(0)
    table = torch.arange(1, 37, dtype=torch.int32).view(3, 12)
    cache = LayerCache(torch.randn(40, 4, 2, 8), torch.randn(40, 4, 2, 8))
    attention, starts = CpuAttention(), [3, 9]
    for number in range(12):
        lens = (1 + number % 3, 1 + (number * 2) % 4)
        context_lens = (starts[0] + lens[0], starts[1] + lens[1], 7)
        step = make_step((0, 0, 0), (*lens, 5), context_lens, table, decodes_go_on=number > 0, num_drafted=2)
        for pages in cache[:2]:
            pages.view(-1, 2, 8)[step.kv_slots_T] = torch.randn(sum(lens) + 5, 2, 8)
        q = torch.randn(sum(lens) + 5, 4, 8)
        attention.plan(step, MEMORY)
        got = attention.attend(q, cache, window, step, MEMORY).view(q.shape)
        first = 0
        for row, count in enumerate((*lens, 5)):
            k, v = (pages[table[row].long()].flatten(0, 1)[: context_lens[row]] for pages in cache[:2])
            want = attend_by_hand(q[first : first + count], k, v, window)
            torch.testing.assert_close(got[first : first + count], want, rtol=1e-5, atol=1e-5)
            first += count
        starts = [start + 1 + (number + row) % length for row, (start, length) in enumerate(zip(starts, lens))]
