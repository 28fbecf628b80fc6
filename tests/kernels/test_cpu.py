"""The CPU's small operations against their formulas."""

from __future__ import annotations

import pytest
import torch

from inlaid.kernels.backend import HeadNorms, LayerCache, Product
from inlaid.kernels.cpu import CpuOps, rms_norm, rotate
from tests.kernels.steps import MEMORY, make_step

OPS = CpuOps()
EPS = 1e-6


def by_formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 0])])
def test_add_norm(rows: torch.Tensor | None) -> None:
    x, weight, residual = torch.randn(5, 8), torch.rand(8), torch.randn(5, 8)
    before, total = residual.clone(), residual + x
    want = by_formula(total if rows is None else total[rows], weight)
    torch.testing.assert_close(OPS.add_norm(Product(x), residual, weight, EPS, MEMORY, rows, keep=False), want)
    assert torch.equal(residual, before)
    torch.testing.assert_close(OPS.add_norm(Product(x), residual, weight, EPS, MEMORY, rows), want)
    assert torch.equal(residual, total)


def test_norm_in_half_precision() -> None:
    x, weight = torch.randn(5, 8), torch.rand(8)
    half = rms_norm(x.half(), weight.half(), EPS)
    torch.testing.assert_close(half.float(), by_formula(x, weight), rtol=5e-3, atol=5e-3)


def test_embed_norm() -> None:
    table, weight = torch.randn(10, 8), torch.rand(8)
    step = make_step((0, 0), (1, 2))
    step.ids_T = torch.tensor([7, 0, 9])
    residual, x = OPS.embed_norm(step, table, weight, EPS, MEMORY)
    assert torch.equal(residual, table[[7, 0, 9]])
    torch.testing.assert_close(x, by_formula(residual, weight))


def test_activate() -> None:
    x = torch.randn(5, 8)
    torch.testing.assert_close(OPS.activate(Product(x), MEMORY), x[:, :4] * x[:, :4].sigmoid() * x[:, 4:])


@pytest.mark.parametrize("with_norms", [False, True])
def test_rope_store(with_norms: bool) -> None:
    """Queries and keys are normalized head by head, then rotated; keys and values go to their slots."""
    H, G, C = 4, 2, 4
    table = torch.arange(1, 7, dtype=torch.int32).view(2, 3)
    step = make_step((0, 0), (1, 3), (9, 3), table)
    angles = torch.outer(torch.arange(12.0), torch.tensor([1.0, 0.1])).repeat(1, 2)
    qkv = torch.randn(4, (H + 2 * G) * C)
    norms = HeadNorms(torch.rand(C), torch.rand(C), EPS) if with_norms else None
    q, k, v = qkv.clone().view(4, H + 2 * G, C).split((H, G, G), dim=1)
    if norms is not None:
        q, k = by_formula(q, norms.q_weight_C), by_formula(k, norms.k_weight_C)
    q, k = q.contiguous(), k.contiguous()
    looked_up = OPS.angles(angles.cos(), angles.sin(), step)
    rotate(q, *looked_up)
    rotate(k, *looked_up)
    cache = LayerCache(torch.zeros(8, 4, G, C), torch.zeros(8, 4, G, C))
    got = OPS.rope_store(Product(qkv), looked_up, cache, H, norms, step)
    torch.testing.assert_close(got, q)
    for pages, rows in zip(cache[:2], (k, v), strict=True):
        torch.testing.assert_close(pages.view(-1, G, C)[step.kv_slots_T], rows)
        assert int((pages != 0).sum()) == rows.numel()


def test_rotation_keeps_length_and_depends_on_distance_only() -> None:
    angles = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.1]))
    angles = torch.cat((angles, angles), 1)
    x = torch.randn(1, 1, 4).expand(6, 2, 4).contiguous()
    before = x.clone()
    rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(x.norm(dim=-1), before.norm(dim=-1))
    torch.testing.assert_close((x[1] * x[0]).sum(-1), (x[5] * x[4]).sum(-1))
    assert not torch.allclose(x[5], before[5])
