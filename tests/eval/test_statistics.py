"""Intervals hold the truth about as often as they say, and a paired test tells a difference from noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import statistics, task
from eval.metrics import METRICS, Answer, Metric
from eval.task import Example

EXACT = METRICS["exact_match"]
TASK = task.load("to_velar")


def judged(right: np.ndarray) -> tuple[list[Answer], list[Example]]:
    return [Answer(text="yes" if r else "no") for r in right], [Example("", "", "yes", (), {})] * len(right)


def test_the_interval_holds_the_true_rate_about_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        answers, asked = judged(rng.random(100) < 0.8)
        found = statistics.estimate(EXACT, TASK, answers, asked)
        held += found.low <= 80 <= found.high
    assert 180 <= held <= 199


@pytest.mark.parametrize(("right", "low", "high"), [(True, 90, 100), (False, 0, 10)])
def test_agreement_of_all_examples_is_not_certainty(right: bool, low: float, high: float) -> None:
    found = statistics.estimate(EXACT, TASK, *judged(np.full(40, right)))
    assert (found.value, found.low > low - 0.1, found.high < high + 0.1) == (100 * right, True, True)
    assert found.high - found.low > 5


def test_a_real_difference_is_told_from_none() -> None:
    rng = np.random.default_rng(2)
    before = rng.random(200) < 0.95
    after = before & (rng.random(200) < 0.9)
    reference, asked = judged(before)
    real = statistics.compare(EXACT, TASK, reference, judged(after)[0], asked)
    none = statistics.compare(EXACT, TASK, reference, reference, asked)
    assert real.p < 0.01
    assert 0 < real.low < real.drop < real.high
    assert (none.drop, none.low, none.high, none.p) == (0, 0, 0, 1)


def test_pairing_sees_what_two_intervals_would_not() -> None:
    """Six examples of 200 lost, none won: the intervals of the two scores overlap, the pairs do not lie."""
    before = np.arange(200) < 120
    after = np.arange(200) < 110
    (reference, asked), (answers, _) = judged(before), judged(after)
    a, b = (statistics.estimate(EXACT, TASK, said, asked) for said in (reference, answers))
    assert b.high > a.low
    assert statistics.compare(EXACT, TASK, reference, answers, asked).p < 0.01


@pytest.mark.parametrize("name", ["bleu", "chrf", "perplexity"])
def test_metrics_of_other_kinds_are_compared_too(name: str) -> None:
    words = "one two three four five six seven".split()
    asked = [Example("", "", " ".join(words[i % 3 :] + words), (), {}) for i in range(15)]
    reference = [Answer(text=e.target, target_nll=1.0 + i % 2, target_tokens=9) for i, e in enumerate(asked)]
    worse = [
        Answer(text=" ".join(e.target.split()[: 4 + i % 5]), target_nll=3.0 + i % 3, target_tokens=9)
        for i, e in enumerate(asked)
    ]
    found = statistics.compare(METRICS[name], TASK, reference, worse, asked)
    assert 0 < found.low <= found.drop <= found.high
    assert found.p < 0.05
    again = statistics.compare(METRICS[name], TASK, worse, reference, asked)
    assert again.drop < 0
    estimate = statistics.estimate(METRICS[name], TASK, worse, asked)
    assert estimate.low <= estimate.value <= estimate.high


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_lowers(p_values: list[float]) -> None:
    corrected = statistics.holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected))
    in_order = [c for _, c in sorted(zip(p_values, corrected))]
    assert in_order == sorted(corrected)
    assert min(corrected) == pytest.approx(min(1, len(p_values) * min(p_values)))


def test_unrowed_metrics_are_few() -> None:
    """Each metric either has rows and a way to combine them, or is computed whole."""
    for name, metric in METRICS.items():
        assert isinstance(metric, Metric)
        assert (metric.rows is None) == (metric.combine is None) == (metric.whole is not None), name
