"""The specification against other people's code: the checkpoint's reader, torch's attention, torch's norms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from inlaid.checkpoint import dequantize, from_codes
from inlaid.kernels import spec
from inlaid.kernels.backend import AdapterPages, Parts, Site
from inlaid.layers import sampler

EPS = 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_those_of_the_checkpoint(bits: int) -> None:
    torch.manual_seed(bits)
    codes, zeros = torch.randint(0, 2**bits, (64, 32)), torch.randint(0, 2**bits, (4, 32))
    group = torch.randperm(64) // 16
    linear = from_codes(codes, zeros, torch.rand(4, 32).half(), group.int(), 16, bits)
    assert torch.equal(spec.weight(linear), dequantize(linear))
    x = torch.randn(3, 64)
    torch.testing.assert_close(spec.quantized_linear(x, linear), x @ dequantize(linear))


def test_zero_points_and_groups_by_hand() -> None:
    """Two inputs of different groups, one output written out: 0.5 * (9 - 3) and 2 * (1 - 15)."""
    codes, zeros = torch.zeros(8, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)
    codes[0, 5], codes[1, 5], zeros[1, 5], zeros[0, 5] = 9, 1, 3, 15
    scales = torch.zeros(2, 8).half()
    scales[1, 5], scales[0, 5] = 0.5, 2.0
    group = torch.tensor([1, 0, 0, 0, 0, 1, 1, 1], dtype=torch.int32)
    found = spec.weight(from_codes(codes, zeros, scales, group, 4, 4))
    assert found[:2, 5].tolist() == [3.0, -28.0]


def test_parts_are_added_as_far_as_they_were_written() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[10.0, 20.0, math.nan, math.nan]]])
    parts = Parts(torch.tensor([[2, 1]], dtype=torch.int32), most=2, height=4, width=2)
    assert spec.sum_of_parts(x, parts).tolist() == [[11.0, 22.0, 3.0, 4.0]]


def test_each_row_has_its_own_adapter() -> None:
    pool = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 0.5])
    table = torch.zeros(2, 3, 3, dtype=torch.int64)
    table[1, 2] = torch.tensor([0, 3, 1])  # A = [1, 2, 3], B = [5, 7]
    pages = AdapterPages(pool, table, torch.full((2, 3), 2.0), [0, 1])
    x, y = torch.ones(2, 3), torch.zeros(2, 3)
    found = spec.lora(x, y, [0, 1], pages, Site(1, (1, 2)))
    assert found.tolist() == [[0.0, 0.0, 0.0], [0.0, 60.0, 84.0]]


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_is_torchs(heads: int, kv_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    length, queries = 11, 4
    k_cache, v_cache = torch.randn(2, 6, 4, kv_heads, 8)
    table = torch.tensor([[0, 0, 0], [4, 1, 3]])
    q = torch.randn(queries, heads, 8)
    found = spec.attention(q, k_cache, v_cache, table, [0, queries], [0, length], window)
    k, v = (cache[table[1]].flatten(0, 1)[:length].transpose(0, 1) for cache in (k_cache, v_cache))
    place = torch.arange(length)
    seen = place <= place[-queries:, None]
    if window is not None:
        seen &= place > place[-queries:, None] - window
    want = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(found, want.transpose(0, 1))


def test_a_sequence_without_tokens_gives_zeros() -> None:
    cache = torch.full((1, 4, 1, 8), math.nan)
    found = spec.attention(torch.randn(1, 2, 8), cache, cache, torch.zeros(1, 1), [1], [0])
    assert torch.equal(found, torch.zeros(1, 2, 8))


def test_norms_are_torchs() -> None:
    x, residual, weight = torch.randn(3, 16), torch.randn(3, 16), torch.rand(16)
    torch.testing.assert_close(spec.rms_norm(x, weight, EPS), F.rms_norm(x, (16,), weight, EPS))
    total, normed = spec.add_norm(x, residual, weight, EPS)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, F.rms_norm(x + residual, (16,), weight, EPS))


def test_embeddings_take_the_newest_token_of_a_row_where_told() -> None:
    table, weight = torch.randn(9, 16), torch.rand(16)
    residual, normed = spec.embed_norm([3, 0, 7], [-1, 1, -1], [8, 5], table, weight, EPS)
    assert torch.equal(residual, table[[3, 5, 7]])
    torch.testing.assert_close(normed, F.rms_norm(residual, (16,), weight, EPS))


def test_rotation_is_multiplication_by_a_unit_number() -> None:
    """Channel c and c + C/2 are the real and imaginary part."""
    x, angles = torch.randn(4, 3, 6), torch.randn(4, 3)
    both = torch.cat((angles, angles), dim=1)
    found = spec.rotate(x, both.cos(), both.sin())
    want = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones(4, 1, 3), angles[:, None])
    torch.testing.assert_close(found, torch.cat((want.real, want.imag), dim=-1))


@pytest.mark.parametrize("normed", [False, True])
def test_keys_are_normed_rotated_and_stored_and_values_as_they_are(normed: bool) -> None:
    torch.manual_seed(0)
    qkv, angles = torch.randn(2, (3 + 1 + 1) * 4), torch.randn(2, 2).repeat(1, 2)
    caches = torch.zeros(2, 3, 4, 1, 4)
    norms = (torch.rand(4), torch.rand(4), EPS) if normed else None
    q = spec.rope_store(qkv, angles.cos(), angles.sin(), caches[0], caches[1], [9, 2], norms)
    heads = qkv.view(2, 5, 4)
    query, key = heads[:, :3], heads[:, 3:4]
    if norms is not None:
        query, key = F.rms_norm(query, (4,), norms[0], EPS), F.rms_norm(key, (4,), norms[1], EPS)
    torch.testing.assert_close(q, spec.rotate(query, angles.cos(), angles.sin()))
    places = caches.flatten(1, 2)[:, [9, 2]]
    torch.testing.assert_close(places[0], spec.rotate(key, angles.cos(), angles.sin()))
    assert torch.equal(places[1], heads[:, 4:])
    assert int((caches != 0).any(dim=-1).sum()) == 4


def test_activation_is_torchs() -> None:
    x = torch.randn(3, 10) * 4
    torch.testing.assert_close(spec.silu_mul(x), F.silu(x[:, :5]) * x[:, 5:])


def test_noise_is_the_samplers() -> None:
    keys, positions = [sampler.seed_key(seed) for seed in (0, 7, 1 << 40)], [0, 5, 70_000]
    found = [[spec.noise(key, place, token) for token in range(50)] for key, place in zip(keys, positions, strict=True)]
    want = sampler.gumbel(torch.tensor(keys), torch.tensor(positions), 50)
    torch.testing.assert_close(torch.tensor(found), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "want"),
    [
        (0, 1.0, 0.0, {0, 1, 2, 3}),
        (2, 1.0, 0.0, {1, 3}),
        (0, 0.6, 0.0, {1, 3}),  # 0.4 + 0.3 reach 0.6
        (0, 0.0, 0.0, {1}),
        (0, 1.0, 0.45, {1, 3, 0}),  # at least 0.45 of 0.4
        (3, 0.75, 0.0, {1, 3}),  # of the three: 4/9 + 3/9 reach 0.75
    ],
)
def test_truncation_by_hand(top_k: int, top_p: float, min_p: float, want: set[int]) -> None:
    assert spec.kept([math.log(p) for p in (0.2, 0.4, 0.1, 0.3)], top_k, top_p, min_p) == want


def test_among_equals_the_smaller_token_comes_first() -> None:
    assert spec.kept([0.0, 1.0, 1.0, 1.0], top_k=2) == {1, 2}
    assert spec.draw([0.0, 1.0, 1.0], temperature=0, key=1, position=1) == 1
