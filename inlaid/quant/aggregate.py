"""One Hessian (or one solution) for many tasks. Each task brings E[x xᵀ] of its own tokens, adapter attached.

    mean        every task counts the same
    sum         every token counts the same, so tasks with more data win: what mixing the data would give
    trace-mean  each Hessian divided by its trace first, so that loud activations do not win
    max-diag    the largest diagonal, with the tasks' mean correlations: positive semi-definite by construction
    max         element-wise maximum, as LoRA-Inlaid words it. It need not be positive semi-definite: two tasks with
                unit variances, one with a correlation of 0.9 between inputs 1 and 2, the other between 2 and 3,
                give a matrix whose smallest eigenvalue is 1 - 0.9 √2 = -0.27. It is repaired by the shift of the
                diagonal that makes that eigenvalue zero: what damping until the factorization holds comes to
    max-clip    the same, repaired by setting negative eigenvalues to zero. This keeps the maximum's false correlations
                (it takes a positive one wherever any task has one) at full strength
    minimax     at each site, the weights of the mean are raised where a task's own relative error is largest, over a
                few rounds of solving; the solution whose worst task is best is kept
    minimax-loss  the best of several solutions for the whole model, by the tasks' losses on calibration answers: the
                mean, then the trace-normalised mean, then whichever was better with the weights (one for each task)
                raised where the loss has grown most. Half of the weight always stays evenly spread, so that no task is
                given up for another. Rounds end when no task's answers have become less likely by more than ENOUGH, or
                PATIENCE of those with raised weights were in vain

The order of the tasks decides the order of the sums: callers bring them sorted, so that any history of additions and
removals ends in the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlaid.quant.grid import Grid
from inlaid.quant.replay import Launch, launch
from inlaid.quant.solver import Solution, reconstruction_error, solve

MINIMAX_LOSS = "minimax-loss"
AGGREGATIONS = ("minimax", MINIMAX_LOSS, "mean", "trace-mean", "sum", "max-diag", "max", "max-clip")
ROUNDS = 5
LOSS_ROUNDS = 6
ENOUGH = 0.05  # nats of a whole answer: its likelihood falls by a twentieth
PATIENCE = 2
STEP = 1.0

Rest = Callable[[], object]


@dataclass(frozen=True)
class TaskHessian:
    """One task's second moments at one site, read when asked for; the tokens that it stands for; and what only
    minimax-loss reads: its share of the weights, and whether the moments are divided by their trace first.
    """

    read: Callable[[], Tensor]
    tokens: float
    share: float = 1.0
    by_trace: bool = True


def combine(aggregation: str, tasks: Sequence[TaskHessian]) -> Tensor:
    """Return the Hessian of every aggregation but minimax. Reads one task at a time."""
    if not tasks:
        raise ValueError("there is no task to aggregate")
    if aggregation == "mean":
        return _weighted(tasks, [1.0 / len(tasks)] * len(tasks))
    if aggregation == "sum":
        total = sum(task.tokens for task in tasks)
        return _weighted(tasks, [task.tokens / total for task in tasks])
    if aggregation in ("trace-mean", MINIMAX_LOSS):
        even = aggregation == "trace-mean"
        total_KK: Tensor | None = None
        for task in tasks:
            hessian_KK = task.read()
            size = max(float(hessian_KK.trace()), 1e-30) if even or task.by_trace else 1.0
            weighted_KK = hessian_KK * ((1.0 if even else task.share) / size)
            total_KK = weighted_KK if total_KK is None else total_KK.add_(weighted_KK)
        assert total_KK is not None
        return total_KK
    if aggregation == "max-diag":
        return _largest_diagonal(tasks)
    if aggregation in ("max", "max-clip"):
        largest_KK = tasks[0].read().clone()
        for task in tasks[1:]:
            torch.maximum(largest_KK, task.read(), out=largest_KK)
        return _shifted(largest_KK) if aggregation == "max" else _clipped(largest_KK)
    raise ValueError(f"aggregation {aggregation!r} is not one of {', '.join(AGGREGATIONS)}")


def solve_together(
    aggregation: str,
    weight_KN: Tensor,
    tasks: Sequence[TaskHessian],
    grid: Grid,
    rest: Rest = lambda: None,
    run: Launch = launch,
) -> Solution:
    """Return one shared quantized weight for all tasks. `rest` and `run` are those of `solve`."""
    if aggregation == "minimax":
        return minimax(weight_KN, tasks, grid, rest=rest, run=run)
    return solve(weight_KN, combine(aggregation, tasks), grid, rest, run)


def minimax(
    weight_KN: Tensor,
    tasks: Sequence[TaskHessian],
    grid: Grid,
    rounds: int = ROUNDS,
    rest: Rest = lambda: None,
    run: Launch = launch,
) -> Solution:
    """Lower the worst task's relative error tr(dW H dWᵀ) / tr(W H Wᵀ) by re-weighting and solving again."""
    energies = [max(_energy(weight_KN, task), 1e-30) for task in tasks]
    shares = torch.ones(len(tasks), dtype=torch.float64) / len(tasks)
    best: tuple[float, Solution] | None = None
    for _ in range(rounds if len(tasks) > 1 else 1):
        hessian_KK = _weighted(tasks, [float(s) / e for s, e in zip(shares, energies, strict=True)])
        solution = solve(weight_KN, hessian_KK, grid, rest, run)
        errors = relative_errors(weight_KN, solution, tasks, energies)
        if best is None or float(errors.max()) < best[0]:
            best = float(errors.max()), solution
        shares = shares * (errors / errors.mean().clamp(min=1e-30)) ** STEP
        shares /= shares.sum()
    assert best is not None
    return best[1]


def raised(shares: Tensor, excess: Tensor) -> Tensor:
    """Return new shares for minimax-loss, raised where a task's loss has grown most; half is always evenly spread."""
    even = 1.0 / len(shares)
    grown = (excess.clamp(min=0) + 0.1 * excess.clamp(min=0).mean() + 1e-12).sqrt()
    moved = (shares - 0.5 * even).clamp(min=0.05 * even) * grown
    return 0.5 * even + 0.5 * moved / moved.sum()


def relative_errors(
    weight_KN: Tensor, solution: Solution, tasks: Sequence[TaskHessian], energies: Sequence[float]
) -> Tensor:
    """Return each task's own reconstruction error, as a share of its outputs' energy."""
    quantized_KN = solution.weight_KN(weight_KN.dtype)
    errors = [float(reconstruction_error(weight_KN, quantized_KN, task.read())) for task in tasks]
    return torch.tensor(errors, dtype=torch.float64).clamp(min=0) / torch.tensor(energies, dtype=torch.float64)


def _energy(weight_KN: Tensor, task: TaskHessian) -> float:
    return float(reconstruction_error(weight_KN, torch.zeros_like(weight_KN), task.read()))


def _weighted(tasks: Sequence[TaskHessian], weights: Sequence[float]) -> Tensor:
    total_KK = tasks[0].read() * weights[0]
    for task, weight in zip(tasks[1:], weights[1:], strict=True):
        total_KK.add_(task.read(), alpha=weight)
    return total_KK


def _largest_diagonal(tasks: Sequence[TaskHessian]) -> Tensor:
    correlations_KK: Tensor | None = None
    largest_K: Tensor | None = None
    for task in tasks:
        hessian_KK = task.read()
        deviation_K = hessian_KK.diagonal().clamp(min=0).sqrt()
        inverse_K = torch.where(deviation_K > 0, 1 / deviation_K, torch.zeros_like(deviation_K))
        scaled_KK = hessian_KK * inverse_K[:, None] * inverse_K[None, :]
        correlations_KK = scaled_KK if correlations_KK is None else correlations_KK.add_(scaled_KK)
        largest_K = deviation_K if largest_K is None else torch.maximum(largest_K, deviation_K)
    assert correlations_KK is not None
    assert largest_K is not None
    return correlations_KK.div_(len(tasks)).mul_(largest_K[:, None]).mul_(largest_K[None, :])


def _shifted(matrix_KK: Tensor) -> Tensor:
    lowest = float(torch.linalg.eigvalsh(matrix_KK.double())[0])
    matrix_KK.diagonal().add_(max(0.0, -lowest))
    return matrix_KK


def _clipped(matrix_KK: Tensor) -> Tensor:
    values_K, vectors_KK = torch.linalg.eigh(matrix_KK.double())
    clipped_KK: Tensor = (vectors_KK * values_K.clamp(min=0)) @ vectors_KK.T
    return clipped_KK.to(matrix_KK.dtype)
