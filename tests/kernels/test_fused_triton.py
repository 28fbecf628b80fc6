"""The fused small operations against the specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from inlaid.kernels import fused_triton as fused
from inlaid.kernels import lora_triton as lora
from inlaid.kernels import spec
from inlaid.kernels.backend import HeadNorms, Parts, Site
from tests.cases import spread
from tests.kernels.test_lora_triton import make_adapters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).half().to(DEVICE)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Compare numbers around 1 that were rounded to half precision some times."""
    torch.testing.assert_close(a.float(), b.float(), rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("width", [64, 896])
def test_norms(width: int) -> None:
    x, residual, weight = half(5, width) * 30, half(5, width), half(width)
    total, normed = spec.add_norm(x, residual, weight, EPS)
    out = torch.empty_like(x)
    fused.norm(x, weight, EPS, out, residual)
    close(out, normed)
    assert torch.equal(residual, total.half())


def test_norm_of_listed_rows_leaves_the_residual() -> None:
    x, residual, weight = half(6, 64), half(6, 64), half(64)
    before = residual.clone()
    rows = torch.tensor([4, 0], dtype=torch.int32, device=DEVICE)
    out = torch.empty(2, 64, dtype=torch.float16, device=DEVICE)
    fused.norm(x, weight, EPS, out, residual, rows, keep=False)
    assert torch.equal(residual, before)
    close(out, spec.add_norm(x, residual, weight, EPS)[1][rows.long()])


def test_embedding_takes_tokens_from_the_device_where_told() -> None:
    table, weight = half(50, 96), half(96)
    ids = torch.tensor([7, 0, 9], dtype=torch.int32, device=DEVICE)
    sources = torch.tensor([-1, 2, -1], dtype=torch.int32, device=DEVICE)
    last = torch.tensor([1, 1, 33], dtype=torch.int32, device=DEVICE)
    residual, out = (torch.empty(3, 96, dtype=torch.float16, device=DEVICE) for _ in range(2))
    fused.embed_norm(ids, sources, last, table, weight, EPS, residual, out)
    embedded, normed = spec.embed_norm(ids.tolist(), sources.tolist(), last.tolist(), table, weight, EPS)
    assert torch.equal(residual, embedded.half())
    close(out, normed)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (14, 2, 64), (8, 1, 128), (3, 3, 48)])
@pytest.mark.parametrize("with_norms", [False, True])
def test_rope_and_store(heads: int, kv_heads: int, width: int, with_norms: bool) -> None:
    tokens, total = 5, heads + 2 * kv_heads
    qkv = half(tokens, total * width)
    angles = torch.outer(torch.arange(40.0), torch.rand(width // 2))
    angles = torch.cat((angles, angles), 1).to(DEVICE)
    cos, sin = angles.cos().half(), angles.sin().half()
    positions = torch.tensor([0, 39, 3, 3, 17], dtype=torch.int64, device=DEVICE)
    slots = torch.tensor([21, 5, 30, 16, 0], dtype=torch.int64, device=DEVICE)
    caches = [torch.zeros(2, 16, kv_heads, width, dtype=torch.float16, device=DEVICE) for _ in range(4)]
    norms = HeadNorms(half(width), half(width), EPS) if with_norms else None
    weights = (norms.q_weight_C, norms.k_weight_C, EPS) if norms else None
    q = spec.rope_store(qkv, cos[positions], sin[positions], caches[2], caches[3], slots.tolist(), weights)
    fused.rope_store(qkv, positions, slots, cos, sin, caches[0], caches[1], heads, norms)
    close(qkv.view(tokens, total, width)[:, :heads], q)
    close(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


def test_silu_mul() -> None:
    x, out = half(4, 2 * 688) * 4, half(4, 688)
    fused.silu_mul(x, out)
    close(out, spec.silu_mul(x))


class Pended:
    """Adapters of several ranks over a few rows, what their shrink left behind, and what the expansion gives."""

    def __init__(self, widths: tuple[int, ...], ranks: tuple[int, ...] = (16, 3, 40), block_r: int = 16) -> None:
        self.slots = np.array([1, 0, 3, 2, 1], np.int32)
        adapters, site = make_adapters(list(ranks), 64, widths, site=2), Site(2, widths)
        tuning = lora.Tuning(parts=2, block_k=32, block_n=32, block_r=block_r)
        plan = lora.plan_rows(self.slots, 5, 16, DEVICE)
        partial = lora.scratch(5, 40, 2, DEVICE)
        partial.fill_(float("nan"))  # what nothing wrote must not be read
        lora.shrink(half(5, 64) / 4, adapters, plan, partial, site, tuning)
        self.pending = lora.Pending(partial, adapters, torch.from_numpy(self.slots).to(DEVICE), site, tuning)
        self.add = lambda y: lora.expand_add(partial, adapters, plan, y, site, tuning)

    def split(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows before and after the expansion."""
        y = half(rows, sum(self.pending.site.widths))
        expanded = y.clone()
        self.add(expanded)
        changed = (y != expanded).any(dim=1).cpu().numpy()
        assert (changed == (self.slots > 0)).all()
        return y, expanded


@pytest.mark.parametrize(("width", "warps"), [(96, 0), (256, 2)])
def test_norm_adds_what_is_pending(width: int, warps: int) -> None:
    pended = Pended((width,))
    y, expanded = pended.split(5)
    residual, weight = half(5, width), half(width)
    other, out = residual.clone(), torch.empty_like(y)
    fused.norm(y, weight, EPS, out, residual, pending=pended.pending, warps=warps)
    total, normed = spec.add_norm(expanded, other, weight, EPS)
    close(out, normed)
    close(residual, total)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "together", "block_r"),
    spread(((*h, *t) for h in [(4, 4, 64), (6, 2, 64), (4, 1, 48)] for t in [(0, 16), (0, 32), (1, 16)]), every=4),
)
def test_rope_adds_what_is_pending(heads: int, kv_heads: int, width: int, together: int, block_r: int) -> None:
    pended = Pended((heads * width, kv_heads * width, kv_heads * width), block_r=block_r)
    y, expanded = pended.split(5)
    angles = torch.outer(torch.arange(9.0), torch.rand(width // 2)).repeat(1, 2).to(DEVICE)
    cos, sin = angles.cos().half(), angles.sin().half()
    positions = torch.tensor([0, 8, 3, 3, 7], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([21, 5, 30, 16, 0], dtype=torch.int32, device=DEVICE)
    caches = [torch.zeros(2, 16, kv_heads, width, dtype=torch.float16, device=DEVICE) for _ in range(4)]
    fused.rope_store(y, positions, slots, cos, sin, caches[0], caches[1], heads, pending=pended.pending, heads=together)
    fused.rope_store(expanded, positions, slots, cos, sin, caches[2], caches[3], heads)
    close(y[:, : heads * width], expanded[:, : heads * width])
    close(caches[0], caches[2])
    close(caches[1], caches[3])


@pytest.mark.parametrize("block", [0, 64])
def test_activation_adds_what_is_pending(block: int) -> None:
    pended = Pended((176, 176))
    y, expanded = pended.split(5)
    out, expected = (torch.empty(5, 176, dtype=torch.float16, device=DEVICE) for _ in range(2))
    fused.silu_mul(y, out, pended.pending, block)
    fused.silu_mul(expanded, expected)
    close(out, expected)


def test_what_is_pending_for_a_row_depends_on_that_row_alone() -> None:
    pended = Pended((64,))
    y, _ = pended.split(5)
    residual, weight = half(5, 64), half(64)
    together, alone = torch.empty_like(y), torch.empty_like(y[:1])
    fused.norm(y[:1], weight, EPS, alone, residual[:1].clone(), pending=pended.pending)
    fused.norm(y, weight, EPS, together, residual, pending=pended.pending)
    assert torch.equal(alone[0], together[0])


def in_parts(rows: int, width: int, tile: tuple[int, int], most: int) -> tuple[torch.Tensor, Parts, torch.Tensor]:
    """Parts of which each tile has its own number, the others never written; and their sum, rounded once."""
    counts = torch.randint(1, most + 1, (-(-rows // tile[0]), width // tile[1]), dtype=torch.int32)
    counts[0, 0], counts[-1, -1] = most, 1
    x = half(most, rows, width)
    expanded = counts.repeat_interleave(tile[0], 0)[:rows].repeat_interleave(tile[1], 1).to(DEVICE)
    x.masked_fill_(torch.arange(most, device=DEVICE)[:, None, None] >= expanded, float("nan"))
    parts = Parts(counts.to(DEVICE), most, *tile)
    return x, parts, spec.sum_of_parts(x, parts).half()


@pytest.mark.parametrize("tile", [(64, 32), (2, 64), (3, 128)])
@pytest.mark.parametrize("gather", [False, True])
def test_norm_adds_parts(tile: tuple[int, int], gather: bool) -> None:
    x, parts, total = in_parts(7, 384, tile, most=4)
    residual, weight = half(7, 384), half(384)
    rows = torch.tensor([6, 0, 3], dtype=torch.int32, device=DEVICE) if gather else None
    out, expected = (torch.empty(3 if gather else 7, 384, dtype=torch.float16, device=DEVICE) for _ in range(2))
    for keep in (False, True):
        other = residual.clone()
        fused.norm(total, weight, EPS, expected, other, rows, keep=keep)
        fused.norm(x, weight, EPS, out, residual, rows, keep=keep, parts=parts)
        assert torch.equal(out, expected)
        assert torch.equal(residual, other)


def test_norm_adds_parts_and_what_is_pending() -> None:
    pended = Pended((96,))
    x, parts, total = in_parts(5, 96, (4, 32), most=3)
    residual, weight, out = half(5, 96), half(96), torch.empty_like(total)
    other, expected = residual.clone(), torch.empty_like(total)
    fused.norm(total, weight, EPS, expected, other, pending=pended.pending)
    fused.norm(x, weight, EPS, out, residual, pending=pended.pending, parts=parts)
    assert torch.equal(out, expected)
    assert torch.equal(residual, other)
