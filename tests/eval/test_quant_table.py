"""The table of quantizers: what it says follows from the cells, and every job solves what its name says."""

from __future__ import annotations

import pytest
import torch

from eval.quant_table import (
    BOUND,
    FULL,
    Cell,
    Job,
    Moments,
    Options,
    _file,
    _moments,
    save_moments,
    solve_base,
    table,
    variants,
    verdict,
)
from inlaid.quant.aggregate import MINIMAX_LOSS, TaskHessian, combine
from inlaid.quant.baselines import scaled_weight
from inlaid.quant.solver import round_to_nearest, solve

OPTIONS = Options(bits=(3,), seeds=(0, 1), group_sizes=(32,), aggregations=(MINIMAX_LOSS, "mean"))


def cell(seed: int, worst: dict[str, float]) -> Cell:
    """Two tasks; each variant loses nothing on the first and so much on the second, in points and in tenths of nats."""
    made = Cell(seed, 3, {}, {})
    made.note(FULL, {"a": (100.0, 0.0), "b": (100.0, 0.0)})
    for variant, lost in worst.items():
        made.note(variant, {"a": (100.0, 0.0), "b": (100.0 - lost, lost / 10)})
    return made


def rows(text: str) -> list[list[str]]:
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[column.strip() for column in line] for line in lines[2:]]


def test_the_verdict_weighs_the_worst_task_over_seeds() -> None:
    mixed, ours = "gptq-mixed", f"mlgptq {MINIMAX_LOSS}"
    cells = [
        cell(0, {mixed: 30.0, ours: 10.0, "mlgptq mean": 4.0, BOUND: 2.0}),
        cell(1, {mixed: 20.0, ours: 18.0, "mlgptq mean": 26.0, BOUND: 4.0}),
    ]
    points, nats = rows(verdict(OPTIONS, cells))
    assert points == ["3", "points", "minimax-loss 14.00 (10.00..18.00)", "14.00 (10.00..18.00)",
                      "25.00 (20.00..30.00)", "3.00 (2.00..4.00)", "yes", "50%"]  # fmt: skip
    assert nats[-2:] == ["yes", "50%"]
    cells[1].note(ours, {"b": (79.0, 2.1)})
    points, _ = rows(verdict(OPTIONS, cells))
    assert points[2].startswith("mean 15.00")
    assert points[-2] == "no"


def test_the_table_leaves_out_what_is_not_whole() -> None:
    whole = cell(0, {"rtn": 40.0, "awq": 0.0})
    whole.note(BOUND, {"a": (90.0, 0.1)})
    assert rows(verdict(OPTIONS, [whole])) == []
    assert rows(table(OPTIONS, [whole])) == [
        ["rtn", "20.00", "40.00", "b", "2.000", "4.000", "b"],
        ["awq", "0.00", "0.00", "none", "0.000", "0.000", "none"],
    ]


def test_every_job_solves_what_it_says(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)

    def moment() -> torch.Tensor:
        x = torch.randn(256, 64, generator=generator)
        return x.T @ x / 256

    original = {name: torch.randn(32, 64, generator=generator) for name in ("q", "k")}
    of_task = {1.0: {task: {"q": moment()} for task in "ab"}}
    made = Moments(
        original, {"q": ["q", "k"]}, of_task, {1.0: {"a": 10.0, "b": 30.0}}, {"q": moment()}, {"q": moment()}
    )
    save_moments(made, _file(str(tmp_path), 7))
    read = _moments(_file(str(tmp_path), 7))
    weight, grid = torch.cat([original["q"].T, original["k"].T], dim=1), OPTIONS.grid(3)
    assert grid.act_order
    in_place = Options(bits=(3,), group_sizes=(32,), act_order=False).grid(3)
    tasks = [TaskHessian(lambda h=of_task[1.0][t]["q"]: h, n, s) for t, n, s in (("a", 10, 0.2), ("b", 30, 0.8))]
    expected = {
        Job(7, 3, "rtn"): round_to_nearest(weight, in_place).weight_KN(),
        Job(7, 3, "awq"): scaled_weight(weight, made.mixed["q"], in_place),
        Job(7, 3, "gptq-mixed"): solve(weight, made.mixed["q"], grid).weight_KN(),
        Job(7, 3, "gptq-generic"): solve(weight, made.generic["q"], grid).weight_KN(),
        Job(7, 3, BOUND, "b"): solve(weight, of_task[1.0]["b"]["q"], grid).weight_KN(),
        Job(7, 3, "mlgptq mean"): solve(weight, combine("mean", tasks), grid).weight_KN(),
        Job(7, 3, f"mlgptq {MINIMAX_LOSS}", shares=(0.2, 0.8)): solve(
            weight, combine(MINIMAX_LOSS, tasks), grid
        ).weight_KN(),
    }
    assert {job.variant for job in expected} == {*variants(OPTIONS), BOUND}
    for job, wanted in expected.items():
        found = solve_base(OPTIONS, read, job)
        assert torch.equal(torch.cat([found["q"].T, found["k"].T], dim=1), wanted), job
    with pytest.raises(KeyError):
        solve_base(OPTIONS, read, Job(7, 3, BOUND, "c"))
