"""Drafts in the simulator: a trace's acceptance at the cost model's step times."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.sim.cost import CostModel
from inlaid.sim.request_log import Arrival
from inlaid.sim.simulate import Outcome, Setup, simulate
from inlaid.sim.traced import NONE, Acceptances, Answer, Guesses, mean_yield


def answer(*places: tuple[int, int]) -> Answer:
    """Return an answer of 40 tokens with these guesses at its places, over and over; of them right."""
    return [NONE, *(Guesses(*places[at % len(places)]) for at in range(39))]


def run(trace: Acceptances | None, guess: float = 1e-6, overlap: bool = False) -> Outcome:
    """Serve four answers of 40 tokens one after the other, in steps of a second."""
    arrivals = [
        Arrival(0.0, NewRequest(
            id=str(i), prompt=[3] * 8, adapter="a", params=SamplingParams(max_tokens=80), true_output_len=40,
        ))
        for i in range(4)
    ]  # fmt: skip
    cost = CostModel(name="test", source="made up", step=1.0, guesses=guess)
    return simulate(
        arrivals, Setup(cost, acceptances=trace, num_guesses=4, scheduler={"max_num_seqs": 64}, overlap=overlap)
    )


@pytest.mark.parametrize("overlap", [False, True])
def test_right_guesses_end_the_same_answers_in_fewer_steps(overlap: bool) -> None:
    plain, fast = run(None, overlap=overlap), run(Acceptances({"a": [answer((4, 3))]}), overlap=overlap)
    assert fast.service == plain.service, "as many tokens are charged"
    assert fast.end < 0.6 * plain.end


def test_the_same_trace_gives_the_same_outcome() -> None:
    trace = {"a": [answer((4, 0), (4, 4), (2, 1), (0, 0))]}
    assert run(Acceptances(trace)).end == run(Acceptances(trace)).end


def test_guesses_that_cost_more_than_they_bring_are_left_after_a_few() -> None:
    assert run(Acceptances({"a": [answer((4, 1))]}), guess=2.0).end < 1.6 * run(None).end


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    trace = Acceptances({"a": [answer((4, 3)), answer((0, 0))], "b": [answer((2, 2), (1, 0))]})
    trace.save(tmp_path / "trace.json")
    read = Acceptances.load(tmp_path / "trace.json")
    assert {name: [list(one) for one in each] for name, each in read.by_adapter.items()} == {
        name: [list(one) for one in each] for name, each in trace.by_adapter.items()
    }


def test_the_yield_of_all_guesses_counts_each_decode_once() -> None:
    assert mean_yield([answer((4, 3))]) == pytest.approx(39 / 10)
    assert mean_yield([answer((4, 0))]) == 1.0


def test_a_trace_with_more_right_than_guessed_is_refused() -> None:
    with pytest.raises(ValueError, match="the trace of 'a'"):
        Acceptances({"a": [[Guesses(1, 2)]]})
    with pytest.raises(ValueError, match="needs answers"):
        Acceptances({"a": []})
