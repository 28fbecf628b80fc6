"""Judges of the demo's answers: whole, by exact match, by its final number, or by running it.

Used by `models/build_demo.py` for the demo's table; any harness that wants the same figures calls `score`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from data import evaluator

Example = Mapping[str, Any]


def exact_match(answer: str, example: Example) -> float:
    """1 where the whole answer equals the reference, surrounding space aside."""
    return float(answer.strip() == str(example["completion"]).strip())


def final_number(answer: str, example: Example) -> float:
    """1 where the last whole number of the answer is the right one."""
    numbers = re.findall(r"-?\d+", answer)
    return float(bool(numbers) and int(numbers[-1]) == example["answer"])


def pass_at_1(answer: str, example: Example) -> float:
    """1 where the expression gives the expected value on every hidden input."""
    try:
        return float(all(_same(evaluator.run(answer, x), expected) for x, expected in example["cases"]))
    except evaluator.UnsafeProgram:
        return 0.0


def _same(value: object, expected: object) -> bool:
    return type(value) is type(expected) and value == expected


METRICS: Mapping[str, Callable[[str, Example], float]] = MappingProxyType(
    {
        "exact_match": exact_match,
        "final_number": final_number,
        "pass_at_1": pass_at_1,
    }
)


def score(metric: str, answers: list[str], examples: list[Example]) -> float:
    """Return the mean over all examples, in points from 0 to 100."""
    judge = METRICS[metric]
    points = [judge(answer, example) for answer, example in zip(answers, examples, strict=True)]
    return 100.0 * sum(points) / len(points)
