"""Drafts checked by a model on a CPU: every answer is the one that plain decoding gives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as changed

from inlaid.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculationConfig
from inlaid.engine.engine import Engine, make_engine
from inlaid.engine.request import Grammar, NewRequest, Output, Request, SamplingParams
from inlaid.engine.speculation import Draft, Speculation
from inlaid.worker.build import Loaded, build_engine

VOCABULARY = 1024  # of the demo
DEMO = Path(__file__).parents[2] / "models" / "demo"
CONFIG = EngineConfig(
    model=str(DEMO / "base"),
    device="cpu",
    dtype="float32",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
    cache=CacheConfig(block_size=8, num_blocks=200),
)
ADAPTERS = {name: str(DEMO / "adapters" / name) for name in ("maths", "code")}
Answer = tuple[list[int], list[tuple[int, int]]]


class Remembered:
    """Guesses the answers that plain decoding gave, with a wrong token at every `wrong`-th place."""

    def __init__(self, answers: dict[str, list[int]], wrong: int) -> None:
        self.answers, self.wrong = answers, wrong

    def draft(self, request: Request, most: int) -> Draft | None:
        known = self.answers[request.id][request.num_outputs :][:most]
        first = request.num_outputs
        tokens = tuple(t ^ 1 if (first + i) % self.wrong == 0 else t for i, t in enumerate(known))  # a token, too
        return Draft(tokens, match=4) if tokens else None

    def end(self, request: Request) -> None:
        pass


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return build_engine(CONFIG, ADAPTERS)


def engine(loaded: Loaded, speculation: Speculation | None) -> Engine:
    """Return a fresh engine on the runner that is loaded."""
    made = make_engine(
        CONFIG, loaded.engine.runner, time.monotonic, num_blocks=200, max_model_len=512,
        adapters=loaded.engine.scheduler.adapters, eos_ids=loaded.model.eos_ids, base_version="v",
        make_grammar=loaded.compile_grammar,
    )  # fmt: skip
    made.scheduler.state.speculation = speculation
    return made


def answers(engine: Engine, requests: Sequence[NewRequest]) -> dict[str, list[Output]]:
    found: dict[str, list[Output]] = {request.id: [] for request in requests}
    try:
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for output in engine.step():
                assert output.refusal is None, output.refusal
                found[output.id].append(output)
    finally:
        for request in requests:  # the next engine on this runner has requests of the same ids
            engine.runner.sampling.forget(request.id)
    engine.scheduler.check_whole()
    return found


def told(outputs: Sequence[Output]) -> dict[str, Any]:
    """Return what a client sees of an answer, and log probabilities apart, which rounding may move."""
    logprobs = [one for output in outputs for one in output.logprobs or ()]
    return {
        "tokens": [token for output in outputs for token in output.tokens],
        "reason": outputs[-1].finish_reason,
        "stop": outputs[-1].stop_token,
        "chosen": [(one.token, one.rank, len(one.top)) for one in logprobs],
    }


def check(loaded: Loaded, requests: Sequence[NewRequest], wrong: int) -> Speculation:
    """Compare speculation with plain decoding; return the speculation."""
    plain = answers(engine(loaded, None), requests)
    known = {name: told(outputs)["tokens"] for name, outputs in plain.items()}
    config = SpeculationConfig(speculation="suffix", num_speculative_tokens=5, speculation_length="fixed")
    speculation = Speculation(config, Remembered(known, wrong))
    fast = answers(engine(loaded, speculation), requests)
    for name, outputs in plain.items():
        assert told(fast[name]) == told(outputs), name
        pairs = zip(
            (one for output in outputs for one in output.logprobs or ()),
            (one for output in fast[name] for one in output.logprobs or ()),
            strict=True,
        )
        for before, now in pairs:
            assert now.logprob == pytest.approx(before.logprob, abs=1e-3)
    return speculation


def asked(loaded: Loaded, *params: SamplingParams, adapters: Sequence[str | None] = (None,)) -> list[NewRequest]:
    return [
        NewRequest(id=f"r{i}", prompt=[5 + i, 40, 41, 42, 40, 41], params=each, adapter=adapters[i % len(adapters)])
        for i, each in enumerate(params)
    ]


@pytest.mark.parametrize("wrong", [3, 1000])
def test_every_way_of_sampling_gives_the_same_answers(loaded: Loaded, wrong: int) -> None:
    plain = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    drawn = changed(plain, temperature=1.0, seed=11)
    first = told(answers(engine(loaded, None), asked(loaded, plain))["r0"])["tokens"]
    requests = asked(
        loaded,
        plain,
        drawn,
        changed(drawn, top_p=0.9, top_k=20, min_p=0.01),
        changed(plain, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2),
        changed(plain, bad_words=((first[3],), (first[0], first[1]))),
        changed(plain, logprobs=3),
        changed(drawn, logprobs=0, frequency_penalty=0.4),
        changed(plain, stop_token_ids=(first[6], first[2]), min_tokens=5),
        changed(plain, logit_bias={first[1]: -5.0, 9: 4.0}),
        changed(drawn, allowed_token_ids=(5, 6, 7, 40, 41, 42)),
        adapters=(None, "maths", "code"),
    )
    speculation = check(loaded, requests, wrong)
    assert speculation.total.accepted > 0
    if wrong > 20:
        assert speculation.total.accepted == speculation.total.guesses, "a right guess was refused"


def test_grammars_filter_guesses_and_spell_what_they_force(loaded: Loaded) -> None:
    pytest.importorskip("llguidance")
    schema = '{"type": "object", "properties": {"temperature": {"type": "integer"}, "weather": {"enum": ["sunny"]}}, '
    schema += '"required": ["temperature", "weather"], "additionalProperties": false}'
    grammars = (Grammar(json_schema=schema), Grammar(regex="(ab|cd){3,20}"), Grammar(choice=("sunny", "sunrise")))
    params = [
        SamplingParams(max_tokens=60, temperature=heat, seed=3, grammar=grammar)
        for grammar in grammars
        for heat in (0.0, 1.0)
    ]
    speculation = check(loaded, asked(loaded, *params), wrong=4)
    assert speculation.total.accepted > 20
    assert loaded.engine.stats()["failures"] == 0


def test_what_a_grammar_forces_is_drafted_without_any_text_to_copy(loaded: Loaded) -> None:
    pytest.importorskip("llguidance")
    params = SamplingParams(max_tokens=40, temperature=0.0, grammar=Grammar(choice=("the only text that is allowed",)))
    speculation = check(loaded, asked(loaded, params), wrong=1)
    assert speculation.total.accepted > 0


sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    seed=st.integers(0, 99),
    top_p=st.sampled_from([1.0, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.8]),
    min_tokens=st.just(0),
    logprobs=st.sampled_from([None, 2]),
    ignore_eos=st.booleans(),
)


@settings(max_examples=5, deadline=None)
@given(
    requests=st.lists(
        st.tuples(sampling, st.sampled_from([None, "maths", "code"]), st.lists(st.integers(5, 60), min_size=1)),
        min_size=1, max_size=5,
    ),
    wrong=st.integers(1, 7),
)  # fmt: skip
def test_any_mix_of_requests_is_answered_as_without_speculation(loaded: Loaded, requests: Any, wrong: int) -> None:
    check(
        loaded,
        [
            NewRequest(id=f"r{i}", prompt=prompt, params=params, adapter=adapter)
            for i, (params, adapter, prompt) in enumerate(requests)
        ],
        wrong,
    )


def test_guesses_beside_the_last_token_of_the_vocabulary_are_tokens(loaded: Loaded) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logit_bias={VOCABULARY - 1: 100.0})
    assert check(loaded, asked(loaded, params), 2).total.accepted > 0


def test_drafts_of_its_own_text_and_of_answers_before_are_used(loaded: Loaded) -> None:
    """The second answer to a prompt takes fewer steps than it has tokens, with the drafter that the flags make."""
    config = replace(CONFIG, speculation=SpeculationConfig(speculation="suffix", speculation_length="fixed"))
    made = make_engine(
        config, loaded.engine.runner, time.monotonic, num_blocks=200, max_model_len=512,
        adapters=loaded.engine.scheduler.adapters, eos_ids=loaded.model.eos_ids, base_version="w",
    )  # fmt: skip
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    first = told(answers(made, asked(loaded, params, adapters=("maths",)))["r0"])
    before = made.stats()["steps"]
    again = told(answers(made, asked(loaded, params, adapters=("maths",)))["r0"])
    assert again == first
    assert made.stats()["steps"] - before < 15
