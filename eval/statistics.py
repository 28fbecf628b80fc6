"""Certainty of scores: intervals by bootstrap, differences between variants by paired resampling. Seeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval import metrics
from eval.metrics import Answer, Metric
from eval.task import Example, Task

RESAMPLES = 1000
SEED = 0
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A score with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The drop of a variant against the reference on the same examples, its 95% interval, and the chance of a
    difference at least so large if the two were alike."""

    drop: float
    low: float
    high: float
    p: float


def estimate(metric: Metric, task: Task, answers: Sequence[Answer], asked: Sequence[Example]) -> Estimate:
    """Return a score and its interval over resampled examples."""
    if metric.rows is None or metric.combine is None:
        value = metrics.score(metric, task, answers, asked)
        low, high = _interval(_resampled_whole(metric, task, answers, asked, resamples=100))
        return Estimate(value, low, high)
    rows = metric.rows(task, answers, asked)
    value = float(metric.combine(rows.sum(0)))
    if np.all(rows == rows[0]) and metric.higher_is_better and value in (0.0, 100.0):
        return _all_alike(value, len(rows))
    low, high = _interval(metric.combine(_counts(len(rows)) @ rows))
    return Estimate(value, low, high)


def compare(
    metric: Metric, task: Task, reference: Sequence[Answer], answers: Sequence[Answer], asked: Sequence[Example]
) -> Difference:
    """Return the drop from reference to answers; p is by approximate randomization: each pair is swapped or not."""
    if metric.rows is None or metric.combine is None:
        return _compare_whole(metric, task, reference, answers, asked)
    before, after = metric.rows(task, reference, asked), metric.rows(task, answers, asked)
    counts = _counts(len(asked))
    drops = _drops(metric, metric.combine(counts @ before), metric.combine(counts @ after))
    swaps = np.random.default_rng(SEED).integers(0, 2, (RESAMPLES, len(asked))).astype(float)
    swapped = _drops(
        metric,
        metric.combine(swaps @ after + (1 - swaps) @ before),
        metric.combine(swaps @ before + (1 - swaps) @ after),
    )
    drop = float(_drops(metric, metric.combine(before.sum(0)), metric.combine(after.sum(0))))
    low, high = _interval(drops)
    return Difference(drop, low, high, _p_value(drop, swapped))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for having looked at all of them (Holm's step-down)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _counts(size: int) -> Floats:
    """Return how often each example is drawn, in each resample: [resamples, examples]."""
    return np.random.default_rng(SEED).multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(float)


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _all_alike(value: float, size: int) -> Estimate:
    """Return Wilson's interval of a proportion of all or none, of which no resample says anything."""
    z2 = 1.96**2
    far = 100 * z2 / (size + z2)
    return Estimate(value, 100 - far, 100.0) if value else Estimate(value, 0.0, far)


def _drops(metric: Metric, reference: Floats, value: Floats) -> Floats:
    return np.asarray(reference - value if metric.higher_is_better else 100 * (value / reference - 1))


def _p_value(drop: float, under_null: Floats) -> float:
    return float((1 + np.sum(np.abs(under_null) >= abs(drop) - 1e-9)) / (1 + len(under_null)))


def _resampled_whole(
    metric: Metric, task: Task, answers: Sequence[Answer], asked: Sequence[Example], resamples: int
) -> Floats:
    draws = np.random.default_rng(SEED).integers(0, len(asked), (resamples, len(asked)))
    return np.array([metrics.score(metric, task, [answers[i] for i in d], [asked[i] for i in d]) for d in draws])


def _compare_whole(
    metric: Metric, task: Task, reference: Sequence[Answer], answers: Sequence[Answer], asked: Sequence[Example]
) -> Difference:
    """Do the same for a metric without rows, by computing it anew for each resample."""
    value: Callable[[Sequence[Answer]], float] = lambda said: metrics.score(metric, task, said, asked)  # noqa: E731
    drop = metrics.drop(metric, value(reference), value(answers))
    before, after = (_resampled_whole(metric, task, said, asked, resamples=100) for said in (reference, answers))
    low, high = _interval(_drops(metric, before, after))
    swapped = []
    for swap in np.random.default_rng(SEED).integers(0, 2, (100, len(asked))):
        first = [b if s else a for s, a, b in zip(swap, reference, answers)]
        second = [a if s else b for s, a, b in zip(swap, reference, answers)]
        swapped.append(metrics.drop(metric, value(first), value(second)))
    return Difference(drop, low, high, _p_value(drop, np.array(swapped)))


def finite(value: float) -> float | None:
    """Return None for infinity and nan, which JSON does not have."""
    return value if math.isfinite(value) else None
