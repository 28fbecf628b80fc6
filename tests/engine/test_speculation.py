"""Speculation in the engine: whatever is guessed, answers, charges and memory are those of plain decoding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.config import ConfigError, SpeculationConfig
from inlaid.engine.policy import POLICIES
from inlaid.engine.request import FinishReason, Request
from inlaid.engine.speculation import Draft, Speculation, make_speculation, resolved
from tests.engine.bench import ADAPTERS, Bench
from tests.engine.fake_runner import EOS, FakeAdapters, generate
from tests.examples import examples


class Oracle:
    """Guesses the right tokens, but a wrong one at places that `wrong` tells."""

    def __init__(self, wrong: Callable[[int], bool] = lambda position: False) -> None:
        self.wrong = wrong
        self.ended: list[str] = []

    def draft(self, request: Request, most: int) -> Draft | None:
        made = generate(request.tokens, request.adapter, most, frozenset())
        first = len(request.tokens)
        return Draft(tuple((t + 1) % 50 if self.wrong(first + i) else t for i, t in enumerate(made)), match=4)

    def end(self, request: Request) -> None:
        self.ended.append(request.id)


def speculation(wrong: Callable[[int], bool] = lambda position: False, **settings: Any) -> Speculation:
    given = {"speculation": "suffix", "num_speculative_tokens": 4, "speculation_length": "fixed", **settings}
    return Speculation(SpeculationConfig(**given), Oracle(wrong))


def both(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("overlap", [False, True])(test)


@both
def test_right_guesses_bring_several_tokens_a_step(overlap: bool) -> None:
    bench = Bench(overlap=overlap, speculation=speculation())
    bench.add("r", [1, 2, 3], max_tokens=11, ignore_eos=True)
    bench.run().check_all()
    sizes = [work.num_tokens for batch in bench.runner.batches for work in batch.works]
    assert sizes == [3, 5, 5], "a prompt, then the newest token and four guesses, twice: 1 + 5 + 5 tokens"
    counts = bench.scheduler.state.speculation.total
    assert (counts.drafts, counts.guesses, counts.accepted) == (2, 8, 8)
    stats = bench.engine.stats()
    assert [stats[f"spec_accepted_at_{place}"] for place in range(4)] == [2, 2, 2, 2]
    assert bench.scheduler.ledger.num_output_tokens == 11


@both
def test_the_limit_is_never_overshot_and_the_last_token_needs_no_guess(overlap: bool) -> None:
    for count in range(1, 8):
        bench = Bench(overlap=overlap, speculation=speculation())
        bench.add("r", [1, 2, 3], max_tokens=count, ignore_eos=True)
        bench.run().check_all()
        assert len(bench.tokens["r"]) == count


@both
def test_a_wrong_guess_costs_its_rows_and_nothing_else(overlap: bool) -> None:
    bench = Bench(overlap=overlap, speculation=speculation(lambda position: True))
    bench.add("r", [1, 2, 3], "a", max_tokens=9, ignore_eos=True)
    bench.run().check_all()
    assert bench.scheduler.state.speculation.total.accepted == 0
    assert len(bench.runner.batches) == 9


@both
def test_an_end_token_among_the_guesses_ends_the_answer_and_what_follows_is_not_charged(overlap: bool) -> None:
    for start in range(20):
        bench = Bench(overlap=overlap, speculation=speculation(), max_model_len=64)
        bench.add("r", [start, 5, 9], max_tokens=40)
        bench.run().check_all()
        assert bench.scheduler.ledger.num_output_tokens == len(bench.tokens["r"])
        if bench.tokens["r"][-1] == EOS:
            assert bench.ends["r"].stop_token == EOS
            return
    raise AssertionError("no answer ended by itself")


def test_min_tokens_holds_inside_a_draft() -> None:
    bench = Bench(speculation=speculation())
    bench.add("r", [1, 2], max_tokens=12, ignore_eos=True, stop_token_ids=tuple(range(50)), min_tokens=7)
    bench.run()
    assert len(bench.tokens["r"]) == 7


@both
def test_only_blocks_of_tokens_that_count_are_published(overlap: bool) -> None:
    """The answer's blocks are found again in the next turn, and hold its KV: the runner checks each that is read."""
    bench = Bench(overlap=overlap, speculation=speculation(lambda position: position % 3 == 0), block_size=4)
    bench.add("r", [1, 2, 3], max_tokens=20, ignore_eos=True)
    bench.run()
    bench.add("next", [1, 2, 3, *bench.tokens["r"], 9], max_tokens=5, ignore_eos=True)
    bench.run().check_all()
    assert bench.firsts["next"].num_cached == 20, "22 tokens of the turn before are computed"


@both
def test_a_request_whose_draft_is_in_flight_is_planned_after_its_result(overlap: bool) -> None:
    bench = Bench(overlap=overlap, speculation=speculation(lambda position: position % 2 == 0))
    for index in range(3):
        bench.add(f"r{index}", [index, 4], max_tokens=15, ignore_eos=True)
    bench.run().check_all()
    for batch in bench.runner.batches:
        assert all(work.start < len(work.request.tokens) or not work.draft for work in batch.works)


@both
def test_a_request_and_a_tenant_may_opt_out(overlap: bool) -> None:
    drafts = speculation(no_speculation_tenant=("quiet",))
    bench = Bench(overlap=overlap, speculation=drafts)
    bench.add("out", [1, 2], max_tokens=6, ignore_eos=True, speculation=False)
    bench.add("quiet", [3, 2], max_tokens=6, ignore_eos=True, tenant="quiet")
    bench.add("in", [4, 2], max_tokens=6, ignore_eos=True)
    bench.run().check_all()
    drafted = {work.request.id for batch in bench.runner.batches for work in batch.works if work.draft}
    assert drafted == {"in"}
    assert drafts.drafter.ended == ["in"], "nothing is learned from the others"


def test_drafts_never_preempt_and_take_no_block_that_a_decode_may_need() -> None:
    bench = Bench(num_blocks=9, block_size=2, speculation=speculation(), admission_margin=0.0, reserve=0.0)
    for index in range(2):
        bench.add(f"r{index}", [index, 2], max_tokens=6, ignore_eos=True)
    bench.run().check_all()
    assert bench.scheduler.num_preemptions == 0


def test_policies_that_count_in_steps_see_the_pace_of_tokens() -> None:
    """Each look at the clock is a tick: with five tokens a step the pace is a fifth of that without drafts."""
    paces = []
    for drafts in (None, speculation()):
        bench = Bench(speculation=drafts, max_model_len=256, num_blocks=200)
        ticks = itertools.count()
        bench.engine.clock = lambda ticks=ticks: float(next(ticks))
        bench.add("r", [1, 2], max_tokens=200, ignore_eos=True)
        bench.run()
        paces.append(bench.scheduler.view.seconds_per_step)
    assert paces[1] == pytest.approx(0.2 * paces[0], rel=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not a JSON object"),
        ('{"method": "eagle"}', "known: ngram, suffix"),
        ('{"method": "ngram", "model": "x"}', "unknown model"),
        ('{"method": "ngram", "num_speculative_tokens": 0}', "1 to 64"),
    ],
)
def test_a_bad_speculative_config_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_speculation(SpeculationConfig(speculative_config=text))


def test_vllms_form_of_the_settings_is_read() -> None:
    given = SpeculationConfig(speculative_config='{"method": "ngram", "num_speculative_tokens": 3}')
    assert resolved(given) == SpeculationConfig(speculation="ngram", num_speculative_tokens=3)
    assert make_speculation(SpeculationConfig()) is None


requests = st.lists(
    st.tuples(
        st.integers(0, 12),  # the step at which it arrives
        st.lists(st.integers(0, 2), min_size=1, max_size=24),
        st.sampled_from([None, *ADAPTERS]),
        st.integers(1, 20),
        st.booleans(),
        st.one_of(st.none(), st.integers(0, 30)),  # the step at which it is aborted
    ),
    min_size=1,
    max_size=12,
)


@examples(40)
@given(
    requests=requests,
    overlap=st.booleans(),
    policy=st.sampled_from(sorted(POLICIES)),
    num_blocks=st.integers(12, 40),
    slots=st.integers(1, 4),
    failing=st.sets(st.integers(1, 30), max_size=2),
    poison=st.dictionaries(st.integers(0, 11), st.sampled_from(["submit", "collect"]), max_size=2),
    wrong=st.sets(st.integers(0, 44), max_size=20),
    length=st.sampled_from(["auto", "fixed"]),
    data=st.data(),
)
def test_any_storm_of_requests_is_answered_as_without_speculation(
    requests: Any,
    overlap: bool,
    policy: str,
    num_blocks: int,
    slots: int,
    failing: set[int],
    poison: dict[int, str],
    wrong: set[int],
    length: str,
    data: st.DataObject,
) -> None:
    """Loads, evictions, aborts, preemptions, failing steps and failing requests, with guesses right and wrong."""
    bench = Bench(
        num_blocks=num_blocks,
        overlap=overlap,
        policy=policy,
        adapters=FakeAdapters(ADAPTERS, slots=slots, load=2),
        speculation=speculation(wrong.__contains__, speculation_length=length),
        max_num_seqs=4,
        max_overtakes=3,
        reserve=data.draw(st.sampled_from([0.0, 0.5])),
    )
    getattr(bench.runner, data.draw(st.sampled_from(["fail_submit", "fail_collect"]))).update(failing)
    turns_bad = data.draw(st.integers(0, 10))
    void = data.draw(st.dictionaries(st.integers(0, 11), st.integers(1, 2), max_size=1))
    for step in range(40):
        if step == turns_bad:
            bench.runner.poison.update({f"r{index}": where for index, where in poison.items()})
            bench.runner.void.update({f"r{index}": times for index, times in void.items()})
        for index, (arrives, prompt, adapter, count, ignore_eos, aborted) in enumerate(requests):
            if arrives == step:
                bench.add(f"r{index}", prompt, adapter, f"t{index % 3}", max_tokens=count, ignore_eos=ignore_eos)
            if aborted == step:
                bench.engine.abort(f"r{index}")
        running = sorted(bench.scheduler.state.running)
        if running and data.draw(st.integers(0, 9)) == 0:
            bench.scheduler.preempt(running[0])
        bench.step()
    bench.run().check_all()
    ledger = bench.scheduler.ledger
    assert ledger.total == pytest.approx(sum(a.service for a in ledger.accounts.values()))
    delivered = sum(len(tokens) for tokens in bench.tokens.values())
    if not any(end.finish_reason is FinishReason.ERROR for end in bench.ends.values()):
        assert ledger.num_output_tokens == delivered
