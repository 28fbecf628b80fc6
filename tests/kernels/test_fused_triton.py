"""The fused small operations against reference.py."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from inlaid.kernels import fused_triton as fused
from inlaid.kernels.reference import ReferenceOps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE = ReferenceOps()
OPS = fused.TritonOps()
EPS = 1e-5


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).half().to(DEVICE)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a.float(), b.float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("width", [64, 896])
def test_norms(width: int) -> None:
    x, residual, weight = half(5, width) * 30, half(5, width), half(width)
    close(OPS.rms_norm(x, weight, EPS), REFERENCE.rms_norm(x, weight, EPS))
    other = residual.clone()
    close(OPS.add_rms_norm(x, residual, weight, EPS), REFERENCE.add_rms_norm(x, other, weight, EPS))
    assert torch.equal(residual, other)


def test_norm_of_listed_rows_leaves_the_residual() -> None:
    x, residual, weight = half(6, 64), half(6, 64), half(64)
    before = residual.clone()
    rows = torch.tensor([4, 0], dtype=torch.int32, device=DEVICE)
    out = torch.empty(2, 64, dtype=torch.float16, device=DEVICE)
    fused.norm(x, weight, EPS, out, residual, rows, keep=False)
    assert torch.equal(residual, before)
    close(out, REFERENCE.add_rms_norm(x, residual, weight, EPS)[rows.long()])


def test_embedding_takes_tokens_from_the_device_where_told() -> None:
    table, weight = half(50, 96), half(96)
    ids = torch.tensor([7, 0, 9], dtype=torch.int32, device=DEVICE)
    sources = torch.tensor([-1, 2, -1], dtype=torch.int32, device=DEVICE)
    last = torch.tensor([1, 1, 33], dtype=torch.int32, device=DEVICE)
    residual, out = (torch.empty(3, 96, dtype=torch.float16, device=DEVICE) for _ in range(2))
    fused.embed_norm(ids, sources, last, table, weight, EPS, residual, out)
    assert torch.equal(residual, table[[7, 33, 9]])
    close(out, REFERENCE.rms_norm(residual, weight, EPS))


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
    norms = (half(width), half(width), EPS) if with_norms else None
    view = qkv.clone().view(tokens, total, width)
    qk, v = view[:, : heads + kv_heads], view[:, heads + kv_heads :]
    if norms:
        qk = torch.cat(
            [
                REFERENCE.rms_norm(qk[:, :heads], norms[0], EPS),
                REFERENCE.rms_norm(qk[:, heads:], norms[1], EPS),
            ],
            dim=1,
        )
    REFERENCE.rotate(qk, cos[positions], sin[positions])
    REFERENCE.store_kv(qk[:, heads:].contiguous(), v.contiguous(), caches[2], caches[3], slots)
    fused.rope_store(qkv, positions, slots, cos, sin, caches[0], caches[1], heads, norms)
    close(qkv.view(tokens, total, width)[:, :heads], qk[:, :heads])
    close(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


def test_separate_rotation_and_store() -> None:
    x, cos, sin = half(3, 4, 32), half(3, 16).repeat(1, 2), half(3, 16).repeat(1, 2)
    expected = x.clone()
    OPS.rotate(x, cos, sin)
    REFERENCE.rotate(expected, cos, sin)
    close(x, expected)
    slots = torch.tensor([3, 9, 20], dtype=torch.int64, device=DEVICE)
    caches = [torch.zeros(2, 16, 4, 32, dtype=torch.float16, device=DEVICE) for _ in range(4)]
    OPS.store_kv(x, expected, caches[0], caches[1], slots)
    REFERENCE.store_kv(x, expected, caches[2], caches[3], slots)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


def test_silu_mul() -> None:
    x = half(4, 2 * 688) * 4
    close(OPS.silu_mul(x), REFERENCE.silu_mul(x))
