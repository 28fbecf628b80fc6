"""GPTQ as a pure function: a weight, the second moments of its inputs and a grid in; codes, scales and zeros out.

`quantize` calls it once for every group of linears that read the same input (their weights side by side, since they
share the Hessian). Nothing here reads files or models.

Codes are chosen one input at a time; the rounding error of each is spread over the inputs not yet chosen, in the way
that the inverse Hessian says. With H = R Rᵀ (R upper triangular, from a Cholesky factorization of H read backwards),
U = R⁻¹ holds all that is needed: after input i is rounded by an error e, W[j] -= U[i, j] / U[i, i] * e for all j > i.

Legend: K inputs, N outputs, G groups, B inputs of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import gcd

import torch
from torch import Tensor

from inlaid.checkpoint import QuantizedLinear, from_codes
from inlaid.quant.grid import Grid, SolverError, check_scales, find_grid, nearest_codes
from inlaid.quant.refine import refine
from inlaid.quant.replay import Launch, launch
from inlaid.quant.rounding import rounder

BLOCK = 128


@dataclass(frozen=True, eq=False)
class Solution:
    """A quantized weight. `loss` is tr(dW H dWᵀ), undamped; `damping` is the share that the factorization took."""

    codes_KN: Tensor  # uint8
    scales_GN: Tensor  # fp16
    zeros_GN: Tensor  # uint8, true zeros, never 0: a file of the first format stores zero - 1
    g_idx_K: Tensor  # int32
    loss: float
    damping: float

    def weight_KN(self, dtype: torch.dtype = torch.float32) -> Tensor:
        group_K = self.g_idx_K.long()
        steps = self.codes_KN.to(torch.int16) - self.zeros_GN.to(torch.int16)[group_K]
        return (self.scales_GN.float()[group_K] * steps).to(dtype)

    def columns(self, start: int, stop: int) -> Solution:
        """Return the part of it that belongs to outputs [start, stop)."""
        cut = slice(start, stop)
        return Solution(
            self.codes_KN[:, cut], self.scales_GN[:, cut], self.zeros_GN[:, cut], self.g_idx_K, self.loss, self.damping
        )

    def packed(self, grid: Grid) -> QuantizedLinear:
        return from_codes(self.codes_KN, self.zeros_GN, self.scales_GN, self.g_idx_K, grid.group_size, grid.bits)


def solve(
    weight_KN: Tensor, hessian_KK: Tensor, grid: Grid, rest: Callable[[], object] = lambda: None, run: Launch = launch
) -> Solution:
    """Quantize a weight so that tr(dW H dWᵀ) is small. Computes in the weight's dtype, factorizes in float64. `rest` is
    called between blocks; `run` calls the passes over the inputs, or replays them.
    """
    _check(weight_KN, hessian_KK, grid)
    order_K = _order(weight_KN, hessian_KK.diagonal(), grid)
    seen_KK = _seen(hessian_KK[order_K][:, order_K])
    spread_KK, damping = _spread(seen_KK, grid.damping)
    importance_K = _importance(hessian_KK.diagonal()[order_K], damping)
    seen_KK = seen_KK.to(weight_KN.dtype)
    seen_KK.diagonal().add_(damping * seen_KK.diagonal().mean())
    arguments = weight_KN.contiguous(), order_K, spread_KK.to(weight_KN.dtype), seen_KK, importance_K
    codes_KN, scales_GN, zeros_GN, g_idx_K = run(("solve", grid), partial(_passes, grid=grid, rest=rest), arguments)
    check_scales(scales_GN)
    unrated = Solution(codes_KN, scales_GN.half(), zeros_GN.to(torch.uint8), g_idx_K, loss=0.0, damping=damping)
    return rated(unrated, weight_KN, hessian_KK)


def _passes(
    weight_KN: Tensor,
    order_K: Tensor,
    spread_KK: Tensor,
    damped_KK: Tensor,
    importance_K: Tensor,
    *,
    grid: Grid,
    rest: Callable[[], object],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes, scales, zeros and groups after GPTQ's pass and the refinement. Spread, damped Hessian and
    importance are in the order of rounding. Nothing is read back from a GPU.
    """
    work_KN = weight_KN[order_K]
    groups = _Groups(weight_KN, importance_K, order_K, grid)
    codes_KN = torch.empty_like(work_KN, dtype=torch.uint8)
    block = _block_size(grid)
    round_block = rounder(work_KN, grid.max_code)
    for start in range(0, len(work_KN), block):
        stop = min(start + block, len(work_KN))
        scale_BN, zero_BN = groups.of(work_KN, start, stop)
        target_BN = work_KN[start:stop]
        spread_BB = spread_KK[start:stop, start:stop]
        errors_BN = round_block(target_BN, spread_BB, scale_BN, zero_BN, codes_KN[start:stop], target_BN)
        work_KN[stop:].addmm_(spread_KK[start:stop, stop:].T, errors_BN, alpha=-1)
        rest()

    scales_GN, zeros_GN, group_K = torch.stack(groups.scales), torch.stack(groups.zeros), groups.group_of_step_K
    if groups.static:  # they are scattered over the order
        by_group_K = torch.argsort(group_K, stable=True)
        order_K, codes_KN, group_K = order_K[by_group_K], codes_KN[by_group_K], group_K[by_group_K]
        damped_KK = damped_KK[by_group_K][:, by_group_K]
    refine(weight_KN[order_K], damped_KK, codes_KN, scales_GN, zeros_GN, grid.refine, block, round_block, rest)
    in_place_K = torch.argsort(order_K)
    return codes_KN[in_place_K], scales_GN, zeros_GN, group_K[in_place_K].to(torch.int32)


def improve(
    stored: Solution, weight_KN: Tensor, hessian_KK: Tensor, grid: Grid, rest: Callable[[], object] = lambda: None
) -> Solution:
    """Improve a solution that was made for another Hessian: its zero points and groups stay, steps and codes are
    refined for `hessian_KK`. Neither makes the damped error larger, so the result is at least as good as `stored`.
    """
    _check(weight_KN, hessian_KK, grid)
    order_K = torch.argsort(stored.g_idx_K, stable=True).long()
    seen_KK = _seen(hessian_KK[order_K][:, order_K]).to(weight_KN.dtype)
    seen_KK.diagonal().add_(grid.damping * seen_KK.diagonal().mean())
    codes_KN, scales_GN = stored.codes_KN[order_K].clone(), stored.scales_GN.to(weight_KN.dtype)
    zeros_GN, block = stored.zeros_GN.to(weight_KN.dtype), _block_size(grid)
    round_block = rounder(weight_KN, grid.max_code)
    refine(weight_KN[order_K], seen_KK, codes_KN, scales_GN, zeros_GN, grid.refine, block, round_block, rest)
    in_place_K = torch.argsort(order_K)
    better = replace(stored, codes_KN=codes_KN[in_place_K], scales_GN=scales_GN.half(), damping=grid.damping)
    return rated(better, weight_KN, hessian_KK)


def rated(solution: Solution, weight_KN: Tensor, hessian_KK: Tensor) -> Solution:
    """Return a solution with its loss under a Hessian."""
    loss = reconstruction_error(weight_KN, solution.weight_KN(weight_KN.dtype), hessian_KK)
    return replace(solution, loss=float(loss))


def round_to_nearest(weight_KN: Tensor, grid: Grid) -> Solution:
    """Round each weight to its nearest code, on the same grids without data."""
    importance_K = torch.ones(len(weight_KN), dtype=weight_KN.dtype, device=weight_KN.device)
    order_K = torch.arange(len(weight_KN), device=weight_KN.device)
    groups = _Groups(weight_KN, importance_K, order_K, replace(grid, act_order=False))
    codes_KN = torch.empty_like(weight_KN, dtype=torch.uint8)
    block = _block_size(grid)
    for start in range(0, len(weight_KN), block):
        stop = min(start + block, len(weight_KN))
        scale_BN, zero_BN = groups.of(weight_KN, start, stop)
        codes_KN[start:stop] = nearest_codes(weight_KN[start:stop], scale_BN, zero_BN, grid.max_code).to(torch.uint8)
    check_scales(torch.stack(groups.scales))
    scales_GN, zeros_GN = torch.stack(groups.scales).half(), torch.stack(groups.zeros).to(torch.uint8)
    return Solution(codes_KN, scales_GN, zeros_GN, groups.group_of_step_K.to(torch.int32), loss=0.0, damping=0.0)


def reconstruction_error(weight_KN: Tensor, quantized_KN: Tensor, hessian_KK: Tensor) -> Tensor:
    """Return tr(dW H dWᵀ): the mean squared error of the outputs, summed, for inputs of this second moment."""
    delta_KN = weight_KN - quantized_KN
    return ((hessian_KK.to(delta_KN.dtype) @ delta_KN) * delta_KN).sum(dtype=torch.float64)


def _importance(diagonal_K: Tensor, damping: float) -> Tensor:
    """Return the weights of errors in the clipping search; inputs that were never seen count as the mean one."""
    mean = diagonal_K.clamp(min=0).mean()
    seen_K = torch.where(diagonal_K > 0, diagonal_K, mean) + damping * mean
    return seen_K if mean > 0 else torch.ones_like(diagonal_K)


def _check(weight_KN: Tensor, hessian_KK: Tensor, grid: Grid) -> None:
    inputs, outputs = weight_KN.shape
    if reason := grid.spec.why_not(inputs, outputs):
        raise SolverError(f"a weight of {inputs} inputs and {outputs} outputs cannot be quantized: {reason}")
    if hessian_KK.shape != (inputs, inputs):
        raise SolverError(f"the Hessian is {tuple(hessian_KK.shape)} for {inputs} inputs")
    if not torch.isfinite(weight_KN).all():
        raise SolverError("the weight has values that are not finite")
    if not torch.isfinite(hessian_KK).all():
        raise SolverError("the Hessian has values that are not finite: the activations overflowed")


def _block_size(grid: Grid) -> int:
    """Return the number of inputs solved together: never across a group's border, so that its grid is known by then."""
    if grid.group_size == -1:
        return BLOCK
    return grid.group_size if grid.group_size <= BLOCK else gcd(grid.group_size, BLOCK)


def _seen(hessian_KK: Tensor) -> Tensor:
    """Return the Hessian in float64, with a row for the inputs that calibration never saw: they count as uncorrelated
    and as loud as the mean, so that they are rounded as they are. Without any data all inputs are alike.
    """
    matrix_KK = hessian_KK.to(torch.float64)
    unseen_K = matrix_KK.diagonal() <= 0
    mean = matrix_KK.diagonal().clamp(min=0).mean()
    matrix_KK = matrix_KK.masked_fill(unseen_K[:, None] | unseen_K[None, :], 0.0)
    matrix_KK.diagonal().add_(torch.where(unseen_K, torch.where(mean > 0, mean, torch.ones_like(mean)), 0.0))
    return matrix_KK


def _spread(matrix_KK: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return U / diag(U), row by row, of the damped matrix, and the damping at which its factorization held."""
    mean = matrix_KK.diagonal().mean()
    while True:
        damped_KK = matrix_KK.clone()
        damped_KK.diagonal().add_(damping * mean)
        lower_KK, failed = torch.linalg.cholesky_ex(damped_KK.flip(0, 1))
        if not failed:
            break
        damping = max(damping * 10, 1e-4)
        if damping > 1e6:
            raise SolverError("the Hessian is so far from positive definite that no damping helps")
    upper_KK = lower_KK.flip(0, 1)
    eye_KK = torch.eye(len(upper_KK), dtype=torch.float64, device=upper_KK.device)
    inverse_KK = torch.linalg.solve_triangular(upper_KK, eye_KK, upper=True)
    return inverse_KK / inverse_KK.diagonal()[:, None], damping


def _order(weight_KN: Tensor, diagonal_K: Tensor, grid: Grid) -> Tensor:
    """Return the order in which inputs are rounded.

    Where groups follow it, small weights of loud inputs come first and like lies beside like, so that the one step of a
    group fits all of its weights. That weighs more than rounding the loudest first: a group of mixed weights has the
    step of its largest.
    """
    if not grid.act_order:
        return torch.arange(len(weight_KN), device=weight_KN.device)
    if grid.static_groups:
        return torch.argsort(diagonal_K, descending=True, stable=True)
    size_K = weight_KN.double().square().mean(1)
    loud_K = diagonal_K.double().clamp(min=1e-6 * float(diagonal_K.clamp(min=0).mean()))
    rank_K = (loud_K + 1e-30).log() - 2 * (size_K + 1e-30).log()
    return torch.argsort(rank_K, descending=True, stable=True)


class _Groups:
    """The grids of the groups, found when the solver reaches them (or all before it starts, if they are static)."""

    def __init__(self, weight_KN: Tensor, importance_K: Tensor, order_K: Tensor, grid: Grid) -> None:
        inputs = len(weight_KN)
        self.grid = grid
        self.size = inputs if grid.group_size == -1 else grid.group_size
        self.importance_K = importance_K.to(weight_KN.dtype)
        self.scales: list[Tensor] = []
        self.zeros: list[Tensor] = []
        in_place_K = torch.arange(inputs, device=weight_KN.device) // self.size
        self.static = grid.static_groups and grid.act_order
        self.group_of_step_K = in_place_K[order_K] if self.static else in_place_K
        if self.static:
            importance = torch.empty_like(self.importance_K)
            importance[order_K] = self.importance_K
            for start in range(0, inputs, self.size):
                self._find(weight_KN[start : start + self.size], importance[start : start + self.size])

    def of(self, work_KN: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero of each input of a block, [B, N]; `work_KN` as it stands now."""
        if not self.static and start % self.size == 0:
            self._find(work_KN[start : start + self.size], self.importance_K[start : start + self.size])
        if self.static:
            group_B = self.group_of_step_K[start:stop]
            return torch.stack(self.scales)[group_B], torch.stack(self.zeros)[group_B]
        shape = (stop - start, -1)
        return self.scales[-1].expand(shape), self.zeros[-1].expand(shape)

    def _find(self, rows_GN: Tensor, importance_G: Tensor) -> None:
        scale_N, zero_N = find_grid(rows_GN, importance_G, self.grid)
        self.scales.append(scale_N)
        self.zeros.append(zero_N)
