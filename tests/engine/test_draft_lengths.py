"""Lengths of drafts: what is learned of chances and costs, and what pays."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.config import SpeculationConfig
from inlaid.engine.account import Account
from inlaid.engine.draft_lengths import PRIOR_CHANCE, Acceptance, StepCosts, choose, grade
from inlaid.engine.request import Batch, Request, SamplingParams, Work
from inlaid.engine.speculation import Draft, Speculation
from tests.examples import examples

worths = st.lists(
    st.lists(st.floats(0.05, 0.99), max_size=4).map(lambda each: list(itertools.accumulate(each, lambda a, b: a * b))),
    max_size=4,
)


@examples(50)
@given(worths, st.floats(0.001, 0.5), st.integers(0, 12))
def test_the_choice_is_the_best_of_all(worths: list[list[float]], slope: float, most: int) -> None:
    decodes = max(1, len(worths))

    def rate(lengths: tuple[int, ...]) -> float:
        tokens = decodes + sum(sum(each[:n]) for each, n in zip(worths, lengths))
        return tokens / (1.0 + slope * sum(lengths))

    taken = choose(worths, decodes, 1.0, slope, most)
    ways = itertools.product(*(range(len(each) + 1) for each in worths))
    assert sum(taken) <= most
    assert rate(tuple(taken)) == pytest.approx(max(rate(way) for way in ways if sum(way) <= most))


def test_free_rows_are_all_taken_and_dear_ones_never() -> None:
    assert choose([[0.9, 0.5], [0.1]], 2, 1.0, 0.0, 99) == [2, 1]
    assert choose([[0.9, 0.5], [0.1]], 2, 1.0, 0.5, 99) == [0, 0]


def test_acceptance_is_learned_by_adapter_and_grade() -> None:
    acceptance = Acceptance()
    before = acceptance.chances("a")[grade(0, 4)]
    for _ in range(60):
        acceptance.note("a", 0, 4, 3, 1)  # the first right, the second wrong: the third says nothing
    assert acceptance.chances("a")[grade(0, 4)] == pytest.approx(0.5, abs=0.1)
    for _ in range(60):
        acceptance.note("a", 1, 8, 2, 2)
    assert acceptance.chances("a")[grade(1, 8)] > 0.9
    assert acceptance.chances("b")[grade(0, 4)] == before == PRIOR_CHANCE[2]


@pytest.mark.parametrize("slope", [0.0, 0.002, 0.02])
def test_base_and_slope_are_learned_from_the_steps(slope: float) -> None:
    costs = StepCosts()
    assert costs.of(4)[1] == 0.0, "an unknown slope is tried"
    for step in range(40):
        costs.note(4, step % 5, 0.01 + slope * (step % 5))
    assert costs.of(4) == pytest.approx((0.01, slope), rel=1e-6, abs=1e-9)


def test_a_hiccup_of_the_clock_does_not_decide() -> None:
    costs = StepCosts()
    for step in range(40):
        costs.note(1, step % 4, 10.0 if step == 20 else 0.01)
    assert costs.of(1)[1] < 0.01


def test_a_slope_that_no_step_has_confirmed_for_long_is_doubted() -> None:
    costs = StepCosts()
    for step in range(20):
        costs.note(4, step % 5, 0.01 + 0.01 * (step % 5))
    before = costs.of(4)[1]
    for _ in range(30):
        costs.doubt(4)
    assert costs.of(4)[1] < 0.1 * before


class Fixed:
    """Guesses four tokens, whatever they are worth."""

    def draft(self, request: Request, most: int) -> Draft | None:
        return Draft((1, 2, 3, 4)[:most], match=4)

    def end(self, request: Request) -> None:
        pass


def run(row_seconds: float, right: int) -> tuple[int, int]:
    """Decode one long answer, of each draft so many guesses right, in steps of one second and more for each guess.
    Return the steps and the guesses."""
    speculation = Speculation(SpeculationConfig(speculation="suffix", num_speculative_tokens=4), Fixed())
    asked = Request(
        id="r", prompt=[1], params=SamplingParams(), adapter="a", adapter_name="a", account=Account("", 0), arrival=0.0,
        tokens=[1, 2], limit=4000,
    )  # fmt: skip
    steps = guesses = 0
    while len(asked.tokens) < 3000:
        work = Work(asked, len(asked.tokens) - 1, 1, True)
        draft = speculation.choose([work], 64).get("r")
        count = 0
        if draft is not None:
            speculation.submitted(asked, draft)
            work = Work(asked, work.start, 1 + len(draft.tokens), True, draft=draft.tokens)
            count = min(right, len(draft.tokens))
            speculation.note_accepted(work, count)
        speculation.note_step(Batch(steps, (work,)), 1.0 + row_seconds * len(work.draft))
        asked.tokens += [3] * (1 + count)
        steps, guesses = steps + 1, guesses + len(work.draft)
    return steps, guesses


def test_where_arithmetic_decides_no_guess_is_made_but_for_a_few_trials() -> None:
    _, guesses = run(1.5, right=4)
    assert 0 < guesses < 0.02 * 3000


def test_where_rows_are_free_all_guesses_are_made_while_they_are_right() -> None:
    steps, _ = run(0.0, right=4)
    assert steps <= 3000 / 4


def test_guesses_that_are_wrong_are_not_made_where_they_cost() -> None:
    steps, guesses = run(0.1, right=0)
    assert steps + 0.1 * guesses < 1.02 * 3000
