"""RequestEncoder on the demo's tokenizer: sources of tokens keep to the limits; each answer has its own seed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from inlaid.engine.refusal import Refused
from inlaid.engine.request import SamplingParams
from inlaid.text.encoder import RequestEncoder, check_template_options, last_tokens
from inlaid.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "models" / "demo" / "base"
TOKENIZER = Tokenizer(DEMO)
VOCABULARY = 1024
ENCODER = RequestEncoder(TOKENIZER, VOCABULARY, max_model_len=64, max_answers=4)
SEATS = RequestEncoder(TOKENIZER, VOCABULARY, max_model_len=64, num_seats=4)
LONG = "x" * (64 * TOKENIZER.max_token_bytes + 1)


def ids() -> Any:
    return map(str, count())


def test_prompts_come_in_four_forms() -> None:
    text = TOKENIZER.encode("the sea")
    assert ENCODER.prompts("the sea") == [text]
    assert ENCODER.prompts(["the sea", "the sea"]) == [text, text]
    assert ENCODER.prompts([5, 6]) == [[5, 6]]
    assert ENCODER.prompts([[5], [6]]) == [[5], [6]]
    assert repr(ENCODER.prompts([[5.0, 6], [6.0]])) == repr([[5, 6], [6]])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "empty list"),
        ([1, "a"], "must be a text"),
        ([True], "must be a text"),
        ([5.5], "must be a text"),
        ([VOCABULARY], "token 1024"),
        ([[-1]], "token -1"),
        (["a"] * 5, "at most 4"),
        (LONG, "more than 64 tokens can hold"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused(given: Any, words: str) -> None:
    with pytest.raises(Refused, match=words) as error:
        ENCODER.prompts(given)
    assert error.value.refusal.param == "prompt"


def test_a_conversation_is_its_template_in_tokens() -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert ENCODER.conversation(messages) == TOKENIZER.encode(TOKENIZER.template.render(messages), False)
    with pytest.raises(Refused, match="more than 64 tokens"):
        ENCODER.conversation([{"role": "user", "content": LONG}])


@pytest.mark.parametrize(
    ("messages", "tools", "options"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": LONG}]}], None, {}),
        ([{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": LONG}}]}], None, {}),
        ([{"role": "user", "content": "a"}], [{"function": {"description": LONG}}], {}),
        ([{"role": "user", "content": "a"}], None, {"documents": [LONG]}),
        ([{"role": "user", "content": "a"}] * 65, None, {}),
    ],
)
def test_all_text_of_a_conversation_is_bounded(messages: Any, tools: Any, options: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="more than 64 tokens"):
        ENCODER.conversation(messages, tools, options)


def test_a_token_that_the_embedding_does_not_have_is_refused_whatever_it_comes_from() -> None:
    """It once failed the whole step, with the other requests in it."""
    small = RequestEncoder(TOKENIZER, max(TOKENIZER.encode("the sea")), max_model_len=64)
    with pytest.raises(Refused, match="the vocabulary has"):
        small.prompts("the sea")
    with pytest.raises(Refused, match="the vocabulary has"):
        small.conversation([{"role": "user", "content": "the sea"}])


def test_a_prompt_that_is_too_long_is_refused_before_it_is_sent_n_times() -> None:
    with pytest.raises(Refused, match="the prompt has 64 tokens; with max_model_len 64 it can have 63 at most"):
        ENCODER.requests(ids(), [[1] * 64], SamplingParams(), 4)
    assert ENCODER.requests(ids(), [[1] * 64], SamplingParams(max_tokens=0, prompt_logprobs=1))


def test_the_log_probabilities_of_prompts_are_bounded() -> None:
    """Ten kilobytes of request once took more than a gigabyte to answer."""
    wide = RequestEncoder(TOKENIZER, VOCABULARY, max_model_len=1024)
    wide.requests(ids(), [[1] * 1000], SamplingParams(prompt_logprobs=100), 4)
    with pytest.raises(Refused, match="3232000 entries") as error:
        wide.requests(ids(), [[1] * 1000], SamplingParams(prompt_logprobs=100), 32)
    assert error.value.refusal.param == "prompt_logprobs"


def test_answers_to_a_prompt_differ_in_their_seeds_only() -> None:
    made = ENCODER.requests(ids(), [[1], [2]], SamplingParams(seed=2**63 - 1), 2, adapter="a", tenant="t")
    assert [(one.id, one.prompt, one.params.seed) for one in made] == [
        ("0", [1], 2**63 - 1),
        ("1", [1], -(2**63)),
        ("2", [2], 2**63 - 1),
        ("3", [2], -(2**63)),
    ]
    assert {(one.adapter, one.tenant) for one in made} == {("a", "t")}
    greedy = ENCODER.requests(ids(), [[1]], SamplingParams(temperature=0.0, seed=7), 3)
    assert [one.params.seed for one in greedy] == [7, 7, 7]


@pytest.mark.parametrize(
    ("ask", "param"),
    [
        (lambda: ENCODER.requests(ids(), [[1]], SamplingParams(), 0), "n"),
        (lambda: ENCODER.requests(ids(), [[1]] * 3, SamplingParams(), 2), "n"),
        (lambda: ENCODER.requests(ids(), [[1]], SamplingParams(top_p=2.0)), "top_p"),
        (lambda: SEATS.requests(ids(), [[1]], SamplingParams(), 4), "n"),
        (lambda: ENCODER.bad_words(["a"] * 600), "bad_words"),
        (lambda: ENCODER.bad_words(["a" * 70_000]), "bad_words"),
        (lambda: last_tokens([1], 0), "truncate_prompt_tokens"),
        (lambda: check_template_options({"tools": []}), "chat_template_kwargs"),
    ],
)
def test_the_parameter_at_fault_is_named(ask: Callable[[], object], param: str) -> None:
    with pytest.raises(Refused) as error:
        ask()
    assert error.value.refusal.param == param


def test_one_request_leaves_a_seat() -> None:
    assert len(SEATS.requests(ids(), [[1]], SamplingParams(), 3)) == 3
    alone = RequestEncoder(TOKENIZER, VOCABULARY, max_model_len=64, num_seats=1)
    assert len(alone.requests(ids(), [[1]], SamplingParams())) == 1


def test_bad_words_are_spelled_with_a_space_and_without() -> None:
    encode = TOKENIZER.encode
    assert set(ENCODER.bad_words(["sea", " sea"])) == {tuple(encode("sea", False)), tuple(encode(" sea", False))}


def test_only_the_last_tokens_are_kept_on_request() -> None:
    assert last_tokens([1, 2, 3], None) == [1, 2, 3]
    assert last_tokens([1, 2, 3], 2) == [2, 3]
    assert last_tokens([1, 2, 3], 9) == [1, 2, 3]
