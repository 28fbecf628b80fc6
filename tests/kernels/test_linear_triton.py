"""The portable quantized linear against the specification, over bits, groups, zero points and act-order."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from inlaid.checkpoint import QuantizedLinear, dequantize, from_codes
from inlaid.kernels import spec
from inlaid.kernels.act_order import sequential
from inlaid.kernels.linear_triton import TritonLinear, permute_columns

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_linear(
    k: int, n: int, bits: int, group: int, symmetric: bool, act_order: bool, seed: int = 0
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    length = k if group == -1 else group
    groups = -(-k // length)
    codes = torch.randint(0, 2**bits, (k, n), generator=generator)
    zeros = torch.full((groups, n), 2 ** (bits - 1))
    if not symmetric:
        zeros = torch.randint(0, 2**bits, (groups, n), generator=generator)
    scales = (torch.rand(groups, n, generator=generator) + 0.5) * k**-0.5 / 2**bits
    g_idx = torch.arange(k) // length
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=generator)]
    return from_codes(codes, zeros, scales.half(), g_idx.int(), group, bits)


def check(weight: QuantizedLinear, rows: int, scale: float = 1.0) -> None:
    backend = TritonLinear()
    assert backend.why_not(weight.spec, DEVICE) is None
    packed = backend.prepare(weight, DEVICE, torch.float16)
    x = (torch.randn(rows, weight.in_features) * scale).half().to(DEVICE)
    out = torch.full((rows, weight.out_features), float("nan"), dtype=torch.float16, device=DEVICE)
    backend.gemm(x, packed, out)
    expected = spec.quantized_linear(x.cpu(), weight).to(DEVICE)
    error = (out.float() - expected).norm() / expected.norm()
    assert torch.isfinite(out).all()
    assert error < 1e-3, f"relative error {error:.2e}"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_all_formats(bits: int, group: int, symmetric: bool, act_order: bool) -> None:
    check(random_linear(128, 96, bits, group, symmetric, act_order), rows=5)


@pytest.mark.parametrize("rows", [1, 16, 17, 33, 70])
def test_rows(rows: int) -> None:
    check(random_linear(192, 64, 4, 64, False, False), rows)


def test_partial_sums_of_a_long_input() -> None:
    check(random_linear(2048, 64, 4, 128, True, False), rows=3)


def test_large_activations() -> None:
    check(random_linear(128, 64, 4, 64, True, False), rows=4, scale=3e3)


def test_sequential_weight_is_the_same_function() -> None:
    weight = random_linear(64, 32, 3, 16, False, True)
    ordered, permutation = sequential(weight)
    assert permutation is not None
    assert torch.equal(dequantize(ordered), dequantize(weight)[permutation.long()])


def test_permuted_columns() -> None:
    x = torch.randn(3, 70).half().to(DEVICE)
    permutation = torch.randperm(70).int().to(DEVICE)
    out = torch.empty_like(x)
    permute_columns(x, permutation, out)
    assert torch.equal(out, x[:, permutation.long()])
