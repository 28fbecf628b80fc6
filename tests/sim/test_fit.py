"""Fitting a cost model: what made the steps is found again, also with noise."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inlaid.sim.cost import CostModel, Load, Step, load_cost
from inlaid.sim.fit import _solve, errors, fit, fit_quickly, main, read_steps, write_cost, write_steps
from inlaid.sim.stairs import fit_stairs, seconds_at


def steps(model: CostModel, count: int, noise: float, seed: int = 0) -> list[Step]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        decodes = rng.randrange(0, 40)
        prefills = rng.randrange(0, 3)
        tokens = prefills * rng.randrange(8, 200)
        load = Load(
            prefill_tokens=tokens,
            prefills=prefills,
            decodes=decodes,
            prompt_context=decodes * rng.randrange(10, 300),
            output_context=decodes * rng.randrange(1, 200),
            prefill_attention=tokens * rng.randrange(8, 200) // 2,
            adapters=min(decodes, rng.randrange(1, 12)),
            adapter_rows=decodes,
            ranks=16 * min(decodes, rng.randrange(1, 12)),
        )
        made.append(Step(model.step_seconds(load) * rng.lognormvariate(-noise * noise / 2, noise), load))
    return made


TRUE = CostModel(
    name="true", source="test", step=2e-3, prefill_tokens=2e-5, decodes=3e-5, prompt_context=2e-7, adapters=5e-5
)


def test_it_finds_the_model_that_made_the_steps() -> None:
    model = fit(steps(TRUE, 500, 0.0), "m", "s")
    assert errors(model, steps(TRUE, 100, 0.0, seed=1))["median_relative_error"] < 1e-3
    assert model.step == pytest.approx(TRUE.step, rel=0.02)


def test_noise_does_not_bias_the_sum() -> None:
    model = fit(steps(TRUE, 2000, 0.4), "m", "s")
    assert abs(errors(model, steps(TRUE, 1000, 0.0, seed=1))["relative_error_of_sum"]) < 0.03


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_least_that_a_step_with_prompts_takes_is_found(noise: float) -> None:
    true = replace(TRUE, prompt_floor=7e-3)
    model = fit(steps(true, 1000, noise), "m", "s")
    assert model.prompt_floor == pytest.approx(true.prompt_floor, rel=0.02 + noise)
    assert model.step == pytest.approx(true.step, rel=0.1 + noise)
    found = errors(model, steps(true, 500, 0.0, seed=1))
    assert abs(found["relative_error_of_sum"]) < 0.01 + noise / 3
    assert fit(steps(TRUE, 1000, noise), "m", "s").prompt_floor < 0.3 * true.prompt_floor


def test_a_device_that_pads_steps_to_sizes_is_a_staircase(tmp_path: Path) -> None:
    sizes = (32, 64, 128, 256, 512, 1024)

    def padded(step: Step) -> Step:
        size = next(size for size in sizes if size >= step.load.prefill_tokens + step.load.decodes)
        beside = TRUE.prompt_context * step.load.prompt_context
        return Step(1e-3 + 2e-5 * size + (2e-3 if step.load.prefills else 0.0) + beside, step.load)

    measured = [padded(step) for step in steps(TRUE, 1500, 0.0)]
    model = fit(measured, "m", "s")
    for size in (64, 128, 256):
        assert any(0.97 * size <= rows <= size for rows, _ in model.prompt_stairs), size
    unseen = [padded(step) for step in steps(TRUE, 300, 0.0, seed=1)]
    assert errors(model, unseen)["r_squared"] > 0.99
    linear = replace(model, decode_stairs=(), prompt_stairs=())
    assert errors(linear, unseen)["median_relative_error"] > 2 * errors(model, unseen)["median_relative_error"]
    assert model.scaled(2.0, "slow").step_seconds(unseen[0].load) == pytest.approx(
        2 * model.step_seconds(unseen[0].load)
    )
    write_cost(tmp_path / "padded.json", model, {}, {})
    assert load_cost(str(tmp_path / "padded.json")) == model


def test_a_staircase_never_falls_and_goes_on_in_proportion() -> None:
    rows, seconds = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 8.0])
    stairs = fit_stairs(rows, seconds, np.ones(4))
    assert stairs == ((1, 1.0), (3, 2.5), (4, 8.0))
    assert [seconds_at(stairs, each) for each in (1, 2, 3, 4, 8)] == [1.0, 2.5, 2.5, 8.0, 16.0]


def test_a_cost_is_never_negative_and_few_steps_are_refused() -> None:
    model = fit(steps(TRUE, 60, 0.5), "m", "s")
    assert all(value >= 0 for value in vars(model).values() if isinstance(value, float))
    with pytest.raises(ValueError, match="too few"):
        fit(steps(TRUE, 10, 0.0), "m", "s")


def test_files_of_steps_become_a_machine(tmp_path: Path) -> None:
    path, out = tmp_path / "steps.jsonl", tmp_path / "cost.json"
    write_steps(path, steps(TRUE, 200, 0.1))
    assert read_steps(path) == steps(TRUE, 200, 0.1)
    assert main([str(path), "--name", "mine", "--load-base", "0.001", "--out", str(out)]) == 0
    machine = load_cost(str(out))
    assert machine.name == "mine"
    assert machine.load_seconds(16) == 0.001
    assert json.loads(out.read_text())["held_out_steps"] == 48
    path.write_text("nonsense")
    assert main([str(path), "--name", "mine", "--out", str(out)]) == 2


def test_the_quick_fit_finds_the_model_and_survives_steps_that_were_held_up() -> None:
    draw = random.Random(3)
    steps = []
    for number in range(300):
        load = Load(decodes=draw.randint(1, 29), prompt_context=draw.randint(0, 2999), ranks=draw.randint(0, 63))
        seconds = 0.004 + 1e-4 * load.decodes + 1e-6 * load.prompt_context + 2e-5 * load.ranks
        steps.append(Step(1.0 if number % 100 == 7 else seconds, load))
    found = fit_quickly(steps, "quick")
    assert found.step == pytest.approx(0.004, rel=0.01)
    assert found.decodes == pytest.approx(1e-4, rel=0.01)
    assert found.ranks == pytest.approx(2e-5, rel=0.01)
    assert found.prefills == 0.0
    with pytest.raises(ValueError, match="50 are needed"):
        fit_quickly(steps[:49], "few")


def test_no_coefficient_can_be_moved_for_a_smaller_error() -> None:
    """Show the conditions of the least squares over x >= 0: no slope where x > 0, none downwards where x = 0."""
    draw = np.random.default_rng(0)
    for number in range(20):
        rows = np.abs(draw.normal(size=(60, 8))) * 10 ** draw.uniform(-1, 4, 8)
        rows[:, 3] = rows[:, 2]  # two that cannot be told apart, and one that never is
        rows[:, 5] = 0
        seconds, weights = rows @ draw.normal(size=8) + number, draw.uniform(0.5, 2, 60)
        found = _solve(rows, seconds, weights)
        slopes = rows.T @ (weights * (rows @ found - seconds)) / np.maximum(np.linalg.norm(rows, axis=0), 1)
        near = 1e-7 * np.linalg.norm(seconds)
        assert (found >= 0).all()
        assert (slopes >= -near).all()
        assert np.abs(slopes[found > 0]).max(initial=0.0) <= near
