"""Lengths of drafts: what is learned of chances and costs, and what pays."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.config import SpeculationConfig
from inlaid.engine.account import Account
from inlaid.engine.draft_costs import LONGEST_PAUSE, AllLooks, Curve, Looks, StepCosts, size_class
from inlaid.engine.draft_lengths import LEAST_MORE, PRIOR_CHANCE, Acceptance, choose, grade
from inlaid.engine.request import Batch, Request, SamplingParams, Work
from inlaid.engine.speculation import Draft, Speculation
from tests.examples import examples

worths = st.lists(
    st.lists(st.floats(0.05, 0.99), max_size=4).map(lambda each: list(itertools.accumulate(each, lambda a, b: a * b))),
    max_size=4,
)


@examples(50)
@given(
    worths, st.floats(0.001, 0.5), st.floats(0.0, 0.5), st.floats(0.0, 0.3), st.integers(0, 12),
    st.lists(st.floats(1.0, 2.0), max_size=6),
)  # fmt: skip
def test_the_choice_is_the_best_of_all(
    worths: list[list[float]], slope: float, once: float, look: float, most: int, few: list[float]
) -> None:
    decodes, curve = max(1, len(worths)), Curve(1.0 + look, 1.0 + look + once, slope, few)

    def rate(lengths: tuple[int, ...]) -> float:
        return (decodes + sum(sum(each[:n]) for each, n in zip(worths, lengths))) / curve.of(sum(lengths))

    taken = tuple(choose(worths, decodes, curve, most))
    ways = itertools.product(*(range(len(each) + 1) for each in worths))
    assert sum(taken) <= most
    best = max(rate(way) for way in ways if sum(way) <= most)
    none = rate((0,) * len(worths))
    assert rate(taken) == pytest.approx(best if best > (1 + LEAST_MORE) * none else none)


def test_free_rows_are_all_taken_and_dear_ones_never() -> None:
    assert choose([[0.9, 0.5], [0.1]], 2, Curve(), 99) == [2, 1]
    assert choose([[0.9, 0.5], [0.1]], 2, Curve(1.0, 1.0, 0.5), 99) == [0, 0]
    assert choose([[0.9, 0.5]], 1, Curve(1.0, 3.0, 0.0), 99) == [0], "the step's own price counts"


def test_acceptance_is_learned_by_adapter_and_grade() -> None:
    acceptance = Acceptance()
    before = acceptance.chances("a")[grade(0, 4)]
    for _ in range(60):
        acceptance.note("a", 0, 4, 3, 1)  # the first right, the second wrong: the third says nothing
    assert acceptance.chances("a")[grade(0, 4)] == pytest.approx(0.5, abs=0.1)
    for _ in range(60):
        acceptance.note("a", 1, 8, 2, 2)
    assert acceptance.chances("a")[grade(1, 8)] > 0.9
    assert before == PRIOR_CHANCE[2]


def test_an_adapter_that_is_new_begins_with_what_all_have_shown() -> None:
    acceptance = Acceptance()
    for _ in range(100):
        acceptance.note("a", 0, 4, 1, 1)
    assert acceptance.chances("new")[grade(0, 4)] > 0.9


@pytest.mark.parametrize("slope", [0.0, 0.2, 2.0])
@pytest.mark.parametrize("once", [0.0, 0.5])
def test_the_price_of_guesses_is_learned_from_the_steps(slope: float, once: float) -> None:
    costs = StepCosts()
    for step in range(40):
        guesses = step % 5
        costs.of(16).add(guesses, 0.01 * (1 + slope * guesses + (once if guesses else 0)), overlapped=False)
    curve = costs.of(16).curve
    assert (curve.look, curve.first, curve.slope) == pytest.approx((1.0, 1.0 + once, slope), rel=1e-6, abs=1e-6)


def test_where_a_row_more_takes_another_kernel_the_price_is_a_table() -> None:
    """The prices of a 7B on an H200 by rows, in steps of one row: 1, 2 and 4 rows are one kernel."""
    table, prices = {1: 1.0, 2: 1.1, 4: 1.4, 8: 2.0, 16: 2.4}, StepCosts().of(1)
    for step in range(200):
        rows = 1 + step % 9
        prices.add(rows - 1, next(took for most, took in table.items() if rows <= most), overlapped=False)
    assert [prices.curve.of(guesses) for guesses in range(9)] == [1.0, 1.1, 1.4, 1.4, 2.0, 2.0, 2.0, 2.0, 2.4]
    assert choose([[0.9, 0.7, 0.5, 0.4, 0.3]], 1, prices.curve, 9) == [3]
    assert choose([[0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]], 1, prices.curve, 9) == [7]


def test_with_overlap_a_look_has_a_price_of_its_own() -> None:
    prices = StepCosts().of(2)
    prices.add(0, 9.0, overlapped=False)
    for _ in range(5):
        prices.add(0, 1.0, overlapped=True)
        prices.add(0, 1.2, overlapped=False)
        prices.add(2, 1.6, overlapped=False)
    assert (prices.curve.look, prices.curve.of(2)) == pytest.approx((1.2, 1.6))


def test_a_hiccup_of_the_clock_does_not_decide_nor_a_machine_that_gets_slower() -> None:
    prices = StepCosts().of(1)
    for step in range(400):
        busy = 1.0 + step / 1000
        guesses = step % 4
        prices.add(guesses, busy * (1.0 + 0.1 * guesses) * (50.0 if step in (20, 77, 301) else 1.0), overlapped=False)
    assert prices.curve.of(3) == pytest.approx(1.3, abs=0.05)


def test_a_price_that_no_step_has_confirmed_for_long_is_doubted() -> None:
    prices = StepCosts().of(4)
    for step in range(20):
        prices.add(step % 5, 0.01 + 0.01 * (step % 5), overlapped=False)
    before = prices.curve.slope
    for _ in range(30):
        prices.doubt()
    assert prices.doubted
    assert prices.curve.slope < 0.1 * before
    prices.add(1, 0.02, overlapped=False)
    assert prices.curve.slope == pytest.approx(before)


def test_a_clock_that_stands_still_makes_guesses_no_cheaper_than_nothing() -> None:
    prices = StepCosts().of(1)
    for step in range(20):
        prices.add(step % 4, 0.0, overlapped=False)
    assert [prices.curve.of(guesses) for guesses in range(9)] == [1.0] * 9


def pauses(looks: Looks, count: int) -> list[int]:
    """Return the pauses of so many looks in vain."""
    found: list[int] = []
    while len(found) < count:
        if looks.note(0.0):
            found.append(looks.pause)
    return found


def test_pauses_grow_while_looks_are_in_vain_and_shrink_when_they_pay() -> None:
    looks = Looks(0, 1)
    assert pauses(looks, 8) == [4, 8, 16, 32, 64, 128, 256, LONGEST_PAUSE]
    for _ in range(9):
        assert not looks.note(1.0)
    assert pauses(looks, 1) == [4]
    assert pauses(Looks(0, 64), 4) == [16, 64, 256, 256], "one look at many requests tells more"


def test_where_looks_are_in_vain_they_are_rare_for_more_requests_from_the_start() -> None:
    every = AllLooks(4)
    pauses(every.of(16, None), 6)
    assert every.of(64, None).pause == LONGEST_PAUSE
    assert every.of(4, None).pause == 4
    assert every.of(1, "a") is not every.of(1, "b")


def test_steps_of_a_new_size_are_priced_as_those_nearest() -> None:
    costs = StepCosts()
    for step in range(40):
        costs.of(16).add(20 * (step % 3), 1.0 + 0.01 * 20 * (step % 3), overlapped=False)
    assert costs.of(20).curve.of(40) == pytest.approx(1.4)
    assert not costs.of(20).known, "guesses are tried in small numbers first"


def test_a_price_of_another_size_keeps_guesses_from_being_tried_for_some_looks_only() -> None:
    """Steps on a CPU are like that: guesses beside 64 decodes take four plain steps, beside one less than two."""
    costs = StepCosts()
    for step in range(40):
        costs.of(64).add(8 * (step % 2), 4.3 if step % 2 else 1.0, overlapped=False)
    few = costs.of(1)
    sure = [[1.0, 1.0]]
    assert choose(sure, 1, few.curve, 2) == [0]
    tried = []
    for _ in range(20):
        few.doubt()
        tried += choose(sure, 1, few.curve, 2)
    assert tried[-1] > 0
    assert few.doubted


def test_sizes_of_a_class_lie_within_a_quarter_of_each_other() -> None:
    classes = [size_class(count) for count in range(1, 300)]
    assert classes == sorted(classes)
    for count in range(1, 300):
        together = [other for other in range(1, 300) if size_class(other) == size_class(count)]
        assert max(together) <= 1.25 * min(together)


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
        speculation.begin(1, "a")
        draft = speculation.choose([work], 64).get("r")
        count = 0
        if draft is not None:
            speculation.submitted(asked, draft)
            work = Work(asked, work.start, 1 + len(draft.tokens), True, draft=draft.tokens)
            count = min(right, len(draft.tokens))
            speculation.note_accepted(work, count)
        speculation.begun(steps)
        speculation.note_step(Batch(steps, (work,)), 1.0 + row_seconds * len(work.draft), overlapped=False)
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
