"""GPTQ's loop over inputs as one kernel gives what the loop gives: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from inlaid.kernels import rounding_triton
from inlaid.quant import solver
from inlaid.quant.grid import Grid
from inlaid.quant.replay import Replays
from inlaid.quant.rounding import round_block, rounder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize(("rows", "width", "max_code"), [(32, 40, 15), (24, 16, 3)])
def test_one_kernel_gives_codes_and_errors_of_the_loop(rows: int, width: int, max_code: int, itself: bool) -> None:
    """Rows that are no power of two, columns that fill no tile, views with one step for all rows, codes that clamp."""
    generator = torch.Generator().manual_seed(rows)
    whole = torch.randn(2 * rows, width, generator=generator).to(DEVICE)
    target, origin = whole[:rows].clone(), whole[rows:]
    scale = (torch.rand(1, width, generator=generator).half().float() * 0.2 + 0.05).to(DEVICE).expand(rows, width)
    zero = torch.randint(1, max_code + 1, (1, width), generator=generator).float().to(DEVICE).expand(rows, width)
    spread = (torch.randn(rows, rows, generator=generator) / rows).to(DEVICE).T  # a transposed view, as solvers give it
    codes = [torch.zeros(rows, width, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    start = target.clone()
    wanted = round_block(start, spread, scale, zero, codes[0], start if itself else origin, max_code)
    found = rounding_triton.round_block(target, spread, scale, zero, codes[1], target if itself else origin, max_code)
    assert float((codes[0] != codes[1]).float().mean()) <= 0.01, "sums may differ in their last digits"
    same = (codes[0] == codes[1]).all(0)
    torch.testing.assert_close(found[:, same], wanted[:, same], rtol=1e-4, atol=1e-4)
    assert len(codes[0].unique()) == max_code + 1


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 2])
def test_solutions_of_the_kernel_and_of_the_loop_are_alike(
    bits: int, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 1024, generator=generator)
    weight, hessian = torch.randn(1024, 512, generator=generator).cuda(), (x.T @ x / len(x)).cuda()
    grid = Grid(bits, 64, act_order=act_order)
    assert rounder(weight, grid.max_code).func is rounding_triton.round_block  # type: ignore[attr-defined]
    fused = solver.solve(weight, hessian, grid)
    again = solver.solve(weight, hessian, grid)
    assert torch.equal(fused.codes_KN, again.codes_KN)
    monkeypatch.setattr(solver, "rounder", lambda like, max_code: partial(round_block, max_code=max_code))
    launched = solver.solve(weight, hessian, grid)
    assert float((fused.codes_KN != launched.codes_KN).float().mean()) < 0.01
    assert fused.loss == pytest.approx(launched.loss, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("bits", [4, 2])
def test_replayed_passes_give_the_same_bits(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    replays, grid = Replays(), Grid.of_width(bits, 64)
    for _ in range(3):  # the first call captures, others replay with other numbers
        x = torch.randn(2048, 576, generator=generator)
        weight, hessian = torch.randn(576, 192, generator=generator).cuda(), (x.T @ x / len(x)).cuda()
        launched, replayed = solver.solve(weight, hessian, grid), solver.solve(weight, hessian, grid, run=replays)
        assert torch.equal(launched.codes_KN, replayed.codes_KN)
        assert torch.equal(launched.scales_GN, replayed.scales_GN)
        assert torch.equal(launched.g_idx_K, replayed.g_idx_K)
