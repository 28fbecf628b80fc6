"""The judge of the code task: agrees with Python on its subset, refuses everything else, and always ends."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import evaluator, families


@given(st.integers(0, 10**6))
def test_agrees_with_python_on_what_the_task_draws(seed: int) -> None:
    _, source, extra = families.code(random.Random(seed))
    cases = extra["cases"]
    assert isinstance(cases, list)
    for x, expected in cases:
        assert eval(source, {"x": x}) == expected == evaluator.run(source, x)


@pytest.mark.parametrize(
    "source",
    [
        "__import__('os').system('true')",
        "x.__class__",
        "open('f')",
        "(lambda: 1)()",
        "[v for v in x for w in x]",
        "'text'",
        "1.5",
        "f(x)",
        "sorted(x, key=len)",
        "sum(x, [])",
        "x + x",
        "x if x else 0",
        "",
        "1 +",
        "max([])",
        "x[99]",
        "1 % 0",
        "10 ** 10",
        "9999999 * 9999999",
        "x[::0]",
        "(" * 500,
        "-" * 1500 + "1",
        "1 + " * 600 + "1",
    ],
)
def test_refuses(source: str) -> None:
    with pytest.raises(evaluator.UnsafeProgram):
        evaluator.run(source, [3, 1, 2])


def test_work_is_bounded() -> None:
    nested = "x"
    for _ in range(6):
        nested = f"[sum([sum(x) for v in {nested}]) for v in x]"
    with pytest.raises(evaluator.UnsafeProgram, match="steps"):
        evaluator.run(nested, list(range(200)))


@given(st.text(max_size=60))
def test_any_text_is_a_value_or_a_refusal(source: str) -> None:
    try:
        value = evaluator.run(source, [1, 2, 3])
    except evaluator.UnsafeProgram:
        return
    assert isinstance(value, int | list)


def test_the_list_given_is_never_changed() -> None:
    x = [3, 1, 2]
    assert evaluator.run("sorted(x, reverse=True)", x) == [3, 2, 1]
    assert x == [3, 1, 2]
