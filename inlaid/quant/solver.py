"""GPTQ as a pure function: a weight, the second moments of its inputs and a grid in; codes, scales and zeros out.

`quantize` calls it once for every group of linears that read the same input (their weights side by side, since they
share the Hessian). Nothing here reads files or models.

Codes are chosen one input at a time; the rounding error of each is spread over the inputs not yet chosen, in the way
that the inverse Hessian says. With H = R Rᵀ (R upper triangular, from a Cholesky factorization of H read backwards),
U = R⁻¹ holds all that is needed: after input i is rounded by an error e, W[j] -= U[i, j] / U[i, i] * e for all j > i.

Legend: K inputs, N outputs, G groups, B inputs of one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import gcd

import torch
from torch import Tensor

from inlaid.checkpoint import QuantizedLinear, QuantSpec, from_codes

BLOCK = 128
CLIP_STEPS = tuple(1.0 - 0.05 * i for i in range(13))


class SolverError(ValueError):
    """The weight or its Hessian cannot be quantized; the message says why."""


@dataclass(frozen=True)
class Grid:
    """The values that a weight may take, and the order in which they are chosen.

    `act_order` chooses the inputs with the largest second moment first; without `static_groups` the groups follow that
    order (g_idx says so), with them they stay where they are in the weight, so that readers need no permutation.
    `clip` searches each group's range for the least weighted squared error instead of taking its extremes.
    `damping` is a share of the Hessian's mean diagonal; it grows tenfold until the factorization holds.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    act_order: bool = False
    static_groups: bool = False
    clip: bool = True
    damping: float = 0.01

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(self.bits, self.group_size, self.symmetric, self.act_order and not self.static_groups)

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1


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
        """The part of it that belongs to outputs [start, stop)."""
        cut = slice(start, stop)
        return Solution(
            self.codes_KN[:, cut], self.scales_GN[:, cut], self.zeros_GN[:, cut], self.g_idx_K, self.loss, self.damping
        )

    def packed(self, grid: Grid) -> QuantizedLinear:
        return from_codes(self.codes_KN, self.zeros_GN, self.scales_GN, self.g_idx_K, grid.group_size, grid.bits)


def solve(weight_KN: Tensor, hessian_KK: Tensor, grid: Grid) -> Solution:
    """Quantize a weight so that tr(dW H dWᵀ) is small. Computes in the weight's dtype, factorizes in float64."""
    _check(weight_KN, hessian_KK, grid)
    diagonal_K = hessian_KK.diagonal().clone()
    order_K = torch.argsort(diagonal_K, descending=True, stable=True) if grid.act_order else None
    work_KN = (weight_KN if order_K is None else weight_KN[order_K]).clone()
    spread_KK, damping = _spread(hessian_KK if order_K is None else hessian_KK[order_K][:, order_K], grid.damping)
    spread_KK = spread_KK.to(work_KN.dtype)
    importance_K = _importance(diagonal_K if order_K is None else diagonal_K[order_K], damping)
    groups = _Groups(weight_KN, importance_K, order_K, grid)

    codes_KN = torch.empty_like(work_KN, dtype=torch.uint8)
    block = _block_size(grid)
    replayed = _ReplayedBlock(work_KN[:block], grid.max_code) if work_KN.is_cuda and len(work_KN) > 4 * block else None
    for start in range(0, len(work_KN), block):
        stop = min(start + block, len(work_KN))
        scale_BN, zero_BN = groups.of(work_KN, start, stop)
        step = replayed if replayed and stop - start == block else partial(_solve_block, max_code=grid.max_code)
        spread_BB = spread_KK[start:stop, start:stop]
        errors_BN = step(work_KN[start:stop], spread_BB, scale_BN, zero_BN, codes_KN[start:stop])
        work_KN[stop:].addmm_(spread_KK[start:stop, stop:].T, errors_BN, alpha=-1)

    if order_K is not None:
        codes_KN = codes_KN[torch.argsort(order_K)]
    scales_GN, zeros_GN, g_idx_K = groups.result()
    unrated = Solution(codes_KN, scales_GN, zeros_GN, g_idx_K, 0.0, damping)
    loss = reconstruction_error(weight_KN, unrated.weight_KN(weight_KN.dtype), hessian_KK)
    return Solution(codes_KN, scales_GN, zeros_GN, g_idx_K, float(loss), damping)


def round_to_nearest(weight_KN: Tensor, grid: Grid) -> Solution:
    """The same grids without data: each weight to its nearest code."""
    identity = torch.ones(len(weight_KN), dtype=weight_KN.dtype, device=weight_KN.device)
    groups = _Groups(weight_KN, identity, None, grid)
    codes_KN = torch.empty_like(weight_KN, dtype=torch.uint8)
    block = _block_size(grid)
    for start in range(0, len(weight_KN), block):
        stop = min(start + block, len(weight_KN))
        scale_BN, zero_BN = groups.of(weight_KN, start, stop)
        codes_KN[start:stop] = _codes(weight_KN[start:stop], scale_BN, zero_BN, grid.max_code).to(torch.uint8)
    scales_GN, zeros_GN, g_idx_K = groups.result()
    return Solution(codes_KN, scales_GN, zeros_GN, g_idx_K, 0.0, 0.0)


def reconstruction_error(weight_KN: Tensor, quantized_KN: Tensor, hessian_KK: Tensor) -> Tensor:
    """tr(dW H dWᵀ): the mean squared error of the outputs, summed over them, for inputs of this second moment."""
    delta_KN = weight_KN - quantized_KN
    return ((hessian_KK.to(delta_KN.dtype) @ delta_KN) * delta_KN).sum(dtype=torch.float64)


def _importance(diagonal_K: Tensor, damping: float) -> Tensor:
    """What the clipping search weighs errors by; inputs that were never seen count as the mean one."""
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
    """Inputs solved together: never across a group's border, so that a group's grid is known when its block begins."""
    if grid.group_size == -1:
        return BLOCK
    return grid.group_size if grid.group_size <= BLOCK else gcd(grid.group_size, BLOCK)


def _spread(hessian_KK: Tensor, damping: float) -> tuple[Tensor, float]:
    """U / diag(U), row by row, of the damped Hessian, and the damping at which its factorization held.

    An input that calibration never saw has no row of its own: it counts as uncorrelated and is rounded as it is.
    """
    matrix_KK = hessian_KK.to(torch.float64)
    diagonal_K = matrix_KK.diagonal()
    unseen_K = diagonal_K <= 0
    mean = diagonal_K.clamp(min=0).mean()
    if not mean > 0:
        return torch.eye(len(matrix_KK), dtype=torch.float64, device=matrix_KK.device), 0.0
    matrix_KK = torch.where(unseen_K[:, None] | unseen_K[None, :], torch.zeros_like(matrix_KK), matrix_KK)
    matrix_KK.diagonal().add_(torch.where(unseen_K, mean, torch.zeros_like(mean)))
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


def _solve_block(
    w_BN: Tensor, spread_BB: Tensor, scale_BN: Tensor, zero_BN: Tensor, codes_BN: Tensor, max_code: int
) -> Tensor:
    """Choose the codes of one block, moving each error to the rows below it; returns the errors. Changes `w_BN`."""
    errors_BN = torch.empty_like(w_BN)
    for i in range(len(w_BN)):
        code_N = _codes(w_BN[i], scale_BN[i], zero_BN[i], max_code)
        torch.sub(w_BN[i], (code_N - zero_BN[i]) * scale_BN[i], out=errors_BN[i])
        w_BN[i + 1 :].addr_(spread_BB[i, i + 1 :], errors_BN[i], alpha=-1)
        codes_BN[i] = code_N
    return errors_BN


class _ReplayedBlock:
    """`_solve_block` as a CUDA graph: its thousand tiny kernels cost more to launch one by one than to run."""

    def __init__(self, like_BN: Tensor, max_code: int) -> None:
        self.w_BN, self.scale_BN, self.zero_BN = (torch.ones_like(like_BN) for _ in range(3))
        self.spread_BB = torch.zeros(len(like_BN), len(like_BN), dtype=like_BN.dtype, device=like_BN.device)
        self.codes_BN = torch.empty_like(like_BN, dtype=torch.uint8)
        buffers = (self.w_BN, self.spread_BB, self.scale_BN, self.zero_BN, self.codes_BN)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            _solve_block(*buffers, max_code)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.errors_BN = _solve_block(*buffers, max_code)

    def __call__(self, w_BN: Tensor, spread_BB: Tensor, scale_BN: Tensor, zero_BN: Tensor, codes_BN: Tensor) -> Tensor:
        self.w_BN.copy_(w_BN)
        self.spread_BB.copy_(spread_BB)
        self.scale_BN.copy_(scale_BN)
        self.zero_BN.copy_(zero_BN)
        self.graph.replay()
        codes_BN.copy_(self.codes_BN)
        return self.errors_BN


def _codes(w: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    return torch.round(w / scale).add_(zero).clamp_(0, max_code)


class _Groups:
    """The grids of the groups, found when the solver reaches them (or all before it starts, if they are static)."""

    def __init__(self, weight_KN: Tensor, importance_K: Tensor, order_K: Tensor | None, grid: Grid) -> None:
        inputs = len(weight_KN)
        self.grid, self.order_K = grid, order_K
        self.size = inputs if grid.group_size == -1 else grid.group_size
        self.importance_K = importance_K.to(weight_KN.dtype)
        self.scales: list[Tensor] = []
        self.zeros: list[Tensor] = []
        in_place_K = torch.arange(inputs, device=weight_KN.device) // self.size
        self.static = grid.static_groups and order_K is not None
        self.group_of_step_K = in_place_K[order_K] if self.static else in_place_K
        if self.static:
            assert order_K is not None
            importance = torch.empty_like(self.importance_K)
            importance[order_K] = self.importance_K
            for start in range(0, inputs, self.size):
                self._find(weight_KN[start : start + self.size], importance[start : start + self.size])

    def of(self, work_KN: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of each input of a block, [B, N]; `work_KN` as it stands now."""
        if not self.static and start % self.size == 0:
            self._find(work_KN[start : start + self.size], self.importance_K[start : start + self.size])
        if self.static:
            group_B = self.group_of_step_K[start:stop]
            return torch.stack(self.scales)[group_B], torch.stack(self.zeros)[group_B]
        shape = (stop - start, -1)
        return self.scales[-1].expand(shape), self.zeros[-1].expand(shape)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        group_K = torch.empty_like(self.group_of_step_K)
        if self.order_K is None:
            group_K = self.group_of_step_K
        else:
            group_K[self.order_K] = self.group_of_step_K
        return torch.stack(self.scales).half(), torch.stack(self.zeros).to(torch.uint8), group_K.to(torch.int32)

    def _find(self, rows_GN: Tensor, importance_G: Tensor) -> None:
        scale_N, zero_N = find_grid(rows_GN, importance_G, self.grid)
        self.scales.append(scale_N)
        self.zeros.append(zero_N)


def find_grid(rows_GN: Tensor, importance_G: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero of one group for every output. The scale is a half-precision number already, as it is stored."""
    low_N, high_N = rows_GN.amin(0).clamp(max=0), rows_GN.amax(0).clamp(min=0)
    if grid.symmetric:
        high_N = torch.maximum(high_N, -low_N)
        low_N = -high_N
    best_scale_N, best_zero_N = _grid_of_range(low_N, high_N, grid)
    if not grid.clip:
        return best_scale_N, best_zero_N
    best_error_N = _weighted_error(rows_GN, importance_G, best_scale_N, best_zero_N, grid)
    for step in CLIP_STEPS[1:]:
        scale_N, zero_N = _grid_of_range(low_N * step, high_N * step, grid)
        error_N = _weighted_error(rows_GN, importance_G, scale_N, zero_N, grid)
        better_N = error_N < best_error_N
        best_error_N = torch.where(better_N, error_N, best_error_N)
        best_scale_N = torch.where(better_N, scale_N, best_scale_N)
        best_zero_N = torch.where(better_N, zero_N, best_zero_N)
    return best_scale_N, best_zero_N


def _grid_of_range(low_N: Tensor, high_N: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes over [low, high]. A zero of at least 1 is kept, so a range that needs none gives up one code below it."""
    if float(high_N.max() - low_N.min()) > 65504.0 * grid.max_code:
        raise SolverError("weights are too large for the half-precision scales of the format")
    scale_N = _stored((high_N - low_N) / grid.max_code)
    if grid.symmetric:
        return scale_N, torch.full_like(scale_N, 2 ** (grid.bits - 1))
    zero_N = torch.round(-low_N / scale_N)
    scale_N = torch.where(zero_N < 1, _stored(high_N / (grid.max_code - 1)), scale_N)
    return scale_N, zero_N.clamp(1, grid.max_code)


def _stored(step_N: Tensor) -> Tensor:
    """A step as the file holds it: a half-precision number above zero."""
    return torch.where(step_N > 0, step_N.half().to(step_N.dtype).clamp(min=2.0**-24), torch.ones_like(step_N))


def _weighted_error(rows_GN: Tensor, importance_G: Tensor, scale_N: Tensor, zero_N: Tensor, grid: Grid) -> Tensor:
    quantized_GN = (_codes(rows_GN, scale_N, zero_N, grid.max_code) - zero_N) * scale_N
    return ((rows_GN - quantized_GN).square() * importance_G[:, None]).sum(0)
