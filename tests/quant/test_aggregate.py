"""Aggregations: what each promises, and the counter-example that the element-wise maximum is about."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inlaid.quant.aggregate import (
    AGGREGATIONS,
    MINIMAX_LOSS,
    TaskHessian,
    combine,
    minimax,
    raised,
    relative_errors,
    solve_together,
)
from inlaid.quant.grid import Grid
from inlaid.quant.solver import solve

CLOSED = [name for name in AGGREGATIONS if name != "minimax"]


def task(hessian: Tensor, tokens: float = 1.0, share: float = 1.0) -> TaskHessian:
    return TaskHessian(lambda: hessian, tokens, share)


def correlated(pair: tuple[int, int]) -> Tensor:
    matrix = torch.eye(3)
    matrix[pair[0], pair[1]] = matrix[pair[1], pair[0]] = 0.9
    return matrix


def random_moments(size: int, seed: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        x = torch.randn(3 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
        found.append((i + 1) * x.T @ x / len(x))
    return found


def lowest(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix.double())[0])


def test_the_maximum_of_two_second_moments_need_not_be_one() -> None:
    first, second = correlated((0, 1)), correlated((1, 2))
    assert min(lowest(first), lowest(second)) > 0
    assert lowest(torch.maximum(first, second)) == pytest.approx(1 - 0.9 * 2**0.5, abs=1e-5)  # -0.27
    for aggregation in CLOSED:
        assert lowest(combine(aggregation, [task(first), task(second)])) > -1e-6, aggregation


def test_repairs_of_the_maximum() -> None:
    first, second = correlated((0, 1)), correlated((1, 2))
    literal = torch.maximum(first, second)
    shifted, clipped = (combine(name, [task(first), task(second)]) for name in ("max", "max-clip"))
    torch.testing.assert_close(shifted - literal, (0.9 * 2**0.5 - 1) * torch.eye(3), atol=1e-5, rtol=0)
    assert torch.linalg.matrix_norm(clipped - literal) < torch.linalg.matrix_norm(shifted - literal)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**31), st.sampled_from(CLOSED))
def test_every_aggregate_is_positive_semi_definite(size: int, seed: int, aggregation: str) -> None:
    moments = random_moments(size, seed)
    combined = combine(aggregation, [task(moment, i + 1.0) for i, moment in enumerate(moments)])
    assert lowest(combined) > -1e-4 * float(combined.diagonal().max())
    torch.testing.assert_close(combined, combined.T)


def test_what_the_weights_are() -> None:
    first, second = random_moments(4, 0, 2)
    tasks = [task(first, 100.0), task(second, 300.0)]
    torch.testing.assert_close(combine("mean", tasks), (first + second) / 2)
    torch.testing.assert_close(combine("sum", tasks), first / 4 + 3 * second / 4)
    torch.testing.assert_close(combine("trace-mean", tasks), first / first.trace() + second / second.trace())
    torch.testing.assert_close(
        combine("max-diag", tasks).diagonal(), torch.maximum(first.diagonal(), second.diagonal())
    )
    weighted = combine(MINIMAX_LOSS, [task(first, share=0.2), task(second, share=0.8)])
    torch.testing.assert_close(weighted, 0.2 * first / first.trace() + 0.8 * second / second.trace())


def test_callers_tensors_are_not_changed() -> None:
    moments = random_moments(8, 1)
    copies = [moment.clone() for moment in moments]
    for aggregation in AGGREGATIONS:
        solve_together(aggregation, torch.randn(8, 16), [task(m) for m in moments], Grid(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(moments, copies))


def test_minimax_is_better_for_the_worst_task_than_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=generator)
    moments = random_moments(64, 3, 4)
    tasks = [task(moment) for moment in moments]
    energies = [float((moment @ weight * weight).sum()) for moment in moments]
    grid = Grid(2, 32)
    mean = relative_errors(weight, solve(weight, combine("mean", tasks), grid), tasks, energies)
    best = relative_errors(weight, minimax(weight, tasks, grid), tasks, energies)
    assert float(best.max()) < float(mean.max())


def test_shares_rise_where_the_loss_grew_and_none_is_given_up() -> None:
    shares = torch.ones(4, dtype=torch.float64) / 4
    for _ in range(10):
        shares = raised(shares, torch.tensor([0.0, 0.1, 0.1, 9.0], dtype=torch.float64))
        assert float(shares.sum()) == pytest.approx(1)
    assert int(shares.argmax()) == 3
    assert float(shares.min()) >= 0.125
    even = torch.ones(4, dtype=torch.float64) / 4
    torch.testing.assert_close(raised(even, torch.zeros(4, dtype=torch.float64)), even)


def test_one_task_is_plain_gptq() -> None:
    weight, moment = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)), random_moments(32, 5, 1)[0]
    plain = solve(weight, moment, Grid(4, 32))
    for aggregation in ("mean", "sum", "max", "minimax"):
        found = solve_together(aggregation, weight, [task(moment)], Grid(4, 32))
        assert (found.codes_KN != plain.codes_KN).float().mean() < 0.01, aggregation


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="no task"):
        combine("mean", [])
    with pytest.raises(ValueError, match="is not one of"):
        combine("median", [task(torch.eye(3))])
