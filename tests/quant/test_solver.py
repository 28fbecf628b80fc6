"""GPTQ against a slow twin written from its definition, at every grid; and what it must refuse or survive."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from inlaid.checkpoint import dequantize
from inlaid.quant.grid import Grid
from inlaid.quant.solver import SolverError, find_grid, reconstruction_error, round_to_nearest, solve
from tests.cases import spread


def problem(inputs: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make a weight and the second moments of correlated inputs with a few loud ones, in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    x = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64) @ (mix + torch.eye(inputs))
    x[:, ::17] *= 6
    return weight, x.T @ x / len(x)


def textbook(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """Optimal brain quantization in a fixed order, by its definition: after each input is rounded, the least-squares
    best change of all the others is applied and its row is struck from the inverse Hessian."""
    size = len(weight) if grid.group_size == -1 else grid.group_size
    damped = hessian + grid.damping * hessian.diagonal().mean() * torch.eye(len(weight), dtype=hessian.dtype)
    inverse = torch.linalg.inv(damped)
    importance = damped.diagonal()
    order = list(range(len(weight)))
    if grid.act_order:
        loud, small = hessian.diagonal(), weight.square().mean(1) ** -2
        rank = loud if grid.static_groups else loud * small
        order.sort(key=lambda i: -float(rank[i]))
    w, result = weight.clone(), torch.empty_like(weight)
    static = {g: find_grid(weight[g * size : (g + 1) * size], importance[g * size : (g + 1) * size], grid)
              for g in range(len(weight) // size)}  # fmt: skip
    for position, i in enumerate(order):
        if grid.static_groups and grid.act_order:
            scale, zero = static[i // size]
        elif position % size == 0:
            members = order[position : position + size]
            scale, zero = find_grid(w[members], importance[members], grid)
        code = (torch.round(w[i] / scale) + zero).clamp(0, grid.max_code)
        result[i] = (code - zero) * scale
        step = (w[i] - result[i]) / inverse[i, i]
        w -= inverse[:, i : i + 1] * step
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # struck out: never read again
    return result


ORDERS = ((False, False), (True, False), (True, True))  # act_order, static_groups


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "order", "clip"),
    spread(product((8, 4, 3, 2), (32, 64, 128, -1), (True, False), ORDERS, (False, True)), every=5),
)
def test_same_codes_as_the_textbook(
    bits: int, group_size: int, symmetric: bool, order: tuple[bool, bool], clip: bool
) -> None:
    weight, hessian = problem(128, 32)
    act_order, static_groups = order
    grid = Grid(bits, group_size, symmetric, act_order, static_groups, clip, refine=0)
    solution = solve(weight, hessian, grid)
    expected = textbook(weight, hessian, grid)
    assert torch.allclose(solution.weight_KN(torch.float64), expected, atol=1e-6)
    assert solution.loss == pytest.approx(float(reconstruction_error(weight, expected, hessian)), rel=1e-4)
    assert solution.damping == grid.damping


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_packed_says_the_same(bits: int, group_size: int, act_order: bool) -> None:
    weight, hessian = problem(128, 32)
    grid = Grid(bits, group_size, act_order=act_order)
    solution = solve(weight.float(), hessian.float(), grid)
    packed = solution.packed(grid)
    assert torch.equal(dequantize(packed), solution.weight_KN())
    assert packed.spec.act_order == (act_order and group_size != -1)
    assert int(solution.zeros_GN.min()) >= 1


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_better_than_rounding_and_clipping_better_still(bits: int) -> None:
    weight, hessian = problem(256, 64)
    grid = Grid(bits, 128, clip=False)
    rounded = reconstruction_error(weight, round_to_nearest(weight, grid).weight_KN(torch.float64), hessian)
    solved = solve(weight, hessian, grid).loss
    clipped = solve(weight, hessian, replace(grid, clip=True)).loss
    assert solved < 0.9 * float(rounded)
    assert bits == 4 or clipped < solved


@pytest.mark.parametrize(("act_order", "static_groups"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_round_of_refinement_helps_at_low_widths(
    act_order: bool, static_groups: bool, group_size: int, symmetric: bool
) -> None:
    weight, hessian = problem(256, 32)
    for bits in (3, 2):
        grid = Grid(bits, group_size, symmetric, act_order, static_groups)
        losses = [solve(weight, hessian, replace(grid, refine=rounds)).loss for rounds in (0, 1, 4)]
        assert losses[2] < losses[1] < 0.97 * losses[0]


def test_groups_gather_inputs_that_are_alike() -> None:
    """Channels scaled up in the input and down in the weight, as after a norm with uneven weights: in place, every
    group mixes large weights with tiny ones that its step cannot resolve."""
    weight, hessian = problem(256, 64)
    scale = torch.exp(torch.randn(256, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    weight, hessian = weight / scale[:, None], hessian * scale[:, None] * scale[None, :]
    gathered, in_place, static = (
        solve(weight, hessian, Grid(3, 64, act_order=order, static_groups=static)).loss
        for order, static in ((True, False), (False, False), (True, True))
    )
    assert gathered < 0.5 * min(in_place, static)


def test_single_precision_is_enough() -> None:
    weight, hessian = problem(256, 64)
    for grid in (Grid(4, 128), Grid(2, 64, act_order=True)):
        exact, single = solve(weight, hessian, grid), solve(weight.float(), hessian.float(), grid)
        assert single.loss == pytest.approx(exact.loss, rel=0.02)


def test_damping_grows_until_it_holds_and_is_reported() -> None:
    weight, hessian = problem(64, 32)
    hessian = hessian - 2 * torch.linalg.eigvalsh(hessian)[20] * torch.eye(64, dtype=hessian.dtype)
    hessian.diagonal().clamp_(min=0.1)
    assert torch.linalg.eigvalsh(hessian)[0] < 0
    solution = solve(weight, hessian, Grid(4, 32))
    assert solution.damping > 0.01
    assert torch.isfinite(solution.weight_KN()).all()


def test_inputs_that_were_never_seen_are_rounded() -> None:
    weight, hessian = problem(64, 32)
    hessian[5], hessian[:, 5] = 0, 0
    grid = Grid(4, 32)
    solution = solve(weight, hessian, grid)
    scale, zero = solution.scales_GN[0].double(), solution.zeros_GN[0].double()
    code = (torch.round(weight[5] / scale) + zero).clamp(0, 15)
    assert torch.equal(solution.codes_KN[5].double(), code)
    nothing, plain = torch.zeros_like(hessian), replace(grid, refine=0)
    assert torch.equal(solve(weight, nothing, plain).codes_KN, round_to_nearest(weight, plain).codes_KN)


def test_groups_of_zeros_and_of_one_sign() -> None:
    weight, hessian = problem(64, 32)
    weight[:32] = 0
    weight[32:] = weight[32:].abs() + 3
    solution = solve(weight, hessian, Grid(4, 32))
    assert torch.equal(solution.weight_KN()[:32], torch.zeros(32, 32))
    assert torch.allclose(solution.weight_KN(torch.float64)[32:], weight[32:], atol=0.8)


def test_what_is_refused() -> None:
    weight, hessian = problem(64, 32)
    with pytest.raises(SolverError, match="groups of 48"):
        solve(weight, hessian, Grid(4, 48))
    with pytest.raises(SolverError, match="not finite"):
        solve(weight / 0, hessian, Grid(4, 32))
    with pytest.raises(SolverError, match="overflowed"):
        solve(weight, hessian * torch.inf, Grid(4, 32))
    with pytest.raises(SolverError, match="Hessian is"):
        solve(weight, hessian[:32, :32], Grid(4, 32))
    for wrong, words in (
        ({"static_groups": True}, "act-order"),
        ({"refine": -1}, "rounds"),
        ({"damping": -1}, "or more"),
    ):
        with pytest.raises(SolverError, match=words):
            replace(Grid(4, 32), **wrong)
    with pytest.raises(SolverError, match="too large"):
        solve(weight * 1e7, hessian, Grid(4, 32))
