"""The learned predictor and inlaid's on the same data: errors of guesses, and a model that learns from prompts."""

from __future__ import annotations

import random

import pytest

from inlaid.engine.predictor import Predictor
from perf.scheduling import predictors
from perf.scheduling.predictors import Example, Model, TaskMeans, as_request, errors


def drawn(count: int, seed: int) -> list[Example]:
    """Draw prompts of two tasks; the first word of one says whether its answer is long."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        long = rng.random() < 0.5
        found.append(Example("told", (7 if long else 8, *rng.choices(range(20, 40), k=6)), 60 if long else 6))
        found.append(Example("short", tuple(rng.choices(range(20, 40), k=6)), 3))
    return found


def test_a_model_learns_what_the_prompt_says_and_a_mean_cannot() -> None:
    train, test = drawn(96, 0), drawn(24, 1)
    model = Model(train, 5)
    rows = {row["predictor"]: row for row in predictors.compare_errors(model, train, test)}
    assert rows["learned encoder"]["pairs_in_order_within_a_task"] > 0.95
    assert rows["a task's mean"]["pairs_in_order_within_a_task"] == 0.5
    assert rows["learned encoder"]["mean_error_factor"] < rows["a task's mean"]["mean_error_factor"]
    assert rows["inlaid's, taught before"]["mean_error_factor"] < rows["a task's mean"]["mean_error_factor"]


def test_errors_are_in_tokens_as_a_factor_and_by_pairs() -> None:
    examples = [Example("a", (1,), 10), Example("a", (2,), 20)]
    right = errors([10.0, 20.0], examples, 0.004)
    assert (right["mean_error_tokens"], right["mean_error_factor"], right["pairs_in_order"]) == (0.0, 1.0, 1.0)
    assert right["ms_per_request"] == 2.0
    wrong = errors([20.0, 10.0], examples, 0.0)
    assert wrong["mean_error_factor"] == pytest.approx(2.0)
    assert wrong["pairs_in_order"] == 0.0


def test_what_is_still_to_come_falls_and_never_below_one() -> None:
    request = as_request(Example("a", (1, 2), 9), 0)
    lengths = TaskMeans({"a": [8, 10], "b": [3]})
    assert lengths.remaining(request) == 9.0
    request.tokens += [0] * 20
    assert lengths.remaining(request) == 1.0
    assert lengths.remaining(as_request(Example("unknown", (1,), 1), 1)) == 6.0


def test_taught_before_means_that_every_answer_was_seen() -> None:
    examples = [Example("a", (1, 2, 3), 40)] * 200
    asked = as_request(examples[0], 0)
    assert predictors.taught(examples).remaining(asked) == pytest.approx(40, rel=0.2)
    assert abs(Predictor().remaining(asked) - 40) > 40  # it starts from its prior
