"""The loop over inputs, replayed as a CUDA graph, gives what it gives launched one by one."""

from __future__ import annotations

import pytest
import torch

from inlaid.quant import solver
from inlaid.quant.grid import Grid
from inlaid.quant.rounding import round_block, rounder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 2])
def test_replayed_and_eager_solutions_are_equal(bits: int, act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 1024, generator=generator)
    weight, hessian = torch.randn(1024, 512, generator=generator).cuda(), (x.T @ x / len(x)).cuda()
    grid = Grid(bits, 64, act_order=act_order)
    replayed = solver.solve(weight, hessian, grid)
    monkeypatch.setattr(solver, "rounder", lambda like, max_code, blocks: rounder(like, max_code, 0))
    eager = solver.solve(weight, hessian, grid)
    assert torch.equal(replayed.codes_KN, eager.codes_KN)
    assert torch.equal(replayed.scales_GN, eager.scales_GN)


def test_each_call_of_a_replayed_block_sees_its_own_arguments() -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    like = torch.empty(64, 96, device="cuda")
    replayed = rounder(like, 7, 100)
    for itself in (True, False, True, False):
        target, origin, scale, zero = (torch.rand(64, 96, generator=generator, device="cuda") + 0.1 for _ in range(4))
        spread = torch.randn(64, 64, generator=generator, device="cuda") / 64
        again = target.clone()
        codes = [torch.zeros(64, 96, dtype=torch.uint8, device="cuda") for _ in range(2)]
        found = replayed(target, spread, scale, zero.ceil(), codes[0], target if itself else origin).clone()
        wanted = round_block(again, spread, scale, zero.ceil(), codes[1], again if itself else origin, 7)
        assert torch.equal(found, wanted)
        assert torch.equal(codes[0], codes[1])
