"""Decoding with the reference as a draft gives what plain greedy decoding gives, whatever the model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from eval import answer, task
from eval.answer import Decoding, Question
from eval.backend import Ask, Graded
from eval.task import Example

END = 0
WORDS = 6
TASK = task.load("to_velar")
CHOICE = task.load("medmcqa")


class Hashing:
    """A greedy model over a few tokens: the next one is a seeded draw from all before, or the reference's."""

    drafts = True

    def __init__(self, seed: int, faithful: float, references: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        self.seed, self.faithful, self.references = seed, faithful, references
        self.refused: dict[str, str] = {}
        self.decoded = 0

    def next(self, tokens: tuple[int, ...], adapter: str | None) -> int:
        rng = random.Random(f"{self.seed}/{adapter}/{tokens}")
        for prompt, target in self.references.items():
            said = tokens[len(prompt) :]
            if tokens[: len(prompt)] == prompt and target[: len(said)] == said and len(said) < len(target):
                return target[len(said)] if rng.random() < self.faithful else rng.randrange(WORDS)
        return rng.randrange(WORDS)

    def generate(self, asks: Sequence[Ask]) -> list[list[int] | str]:
        said: list[list[int] | str] = []
        for ask in asks:
            tokens: list[int] = []
            while len(tokens) < ask.max_tokens and (one := self.next((*ask.prompt, *tokens), ask.adapter)) != END:
                tokens.append(one)
            self.decoded += len(tokens)
            said.append(tokens)
        return said

    def grade(self, asks: Sequence[Ask], continuations: Sequence[Sequence[int]]) -> list[Graded]:
        graded = []
        for ask, more in zip(asks, continuations):
            chosen = [self.next((*ask.prompt, *more[:i]), ask.adapter) == one for i, one in enumerate(more)]
            graded.append(Graded(tuple(-0.1 if one else -3.0 for one in chosen), tuple(chosen)))
        return graded

    def close(self) -> None: ...


class Letters:
    """A tokenizer of letters."""

    chat_template = None
    eos_token_id = END

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(letter) % (WORDS - 1) for letter in text]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(chr(96 + token) for token in tokens if token != END)


def ask(prompts: list[tuple[int, ...]], targets: list[tuple[int, ...]]) -> list[tuple[Question, str | None]]:
    example = Example("", "", "", (), {})
    return [
        (Question(TASK, example, prompt, (*target, END), ()), None if index % 3 == 0 else f"adapter-{index % 3}")
        for index, (prompt, target) in enumerate(zip(prompts, targets))
    ]


TOKENS = st.lists(st.integers(1, WORDS - 1), min_size=1, max_size=120).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([0.0, 0.6, 0.95, 1.0]), st.lists(TOKENS, min_size=1, max_size=4), st.data()
)
def test_the_draft_changes_nothing(seed: int, faithful: float, prompts: list[Any], data: st.DataObject) -> None:
    targets = [data.draw(TOKENS) for _ in prompts]
    pairs = ask(prompts, targets)
    model = Hashing(seed, faithful, {prompt: (*target, END) for prompt, target in zip(prompts, targets)})
    drafted = answer.answer(model, pairs, Letters())
    plain = answer.answer(model, pairs, Letters(), decoding="plain")
    assert [one.text for one in drafted] == [one.text for one in plain]
    assert [one.target_nll for one in drafted] == [one.target_nll for one in plain]


def test_a_right_answer_costs_no_decoding() -> None:
    model = Hashing(0, 1.0, {(1, 2): (3, 4, 5, END)})
    (said,) = answer.answer(model, ask([(1, 2)], [(3, 4, 5)]), Letters())
    assert (said.text, model.decoded) == ("cde", 0)


def test_a_forward_pass_alone_tells_which_references_are_written() -> None:
    """The answers that equal the reference are those of decoding; the others are empty, and nothing is decoded."""
    targets = [(3, 4, 5), (2, 2), (5, 1, 1, 1), (4,)]
    pairs = ask([(1, index) for index in range(4)], targets)
    for seed in range(20):
        model = Hashing(seed, 0.7, {q.prompt: q.target for q, _ in pairs})
        decoded = answer.answer(model, pairs, Letters(), "plain")
        before = model.decoded
        judged = answer.answer(model, pairs, Letters(), "forward")
        wanted = [Letters().decode(q.target, True) for q, _ in pairs]
        assert [one.text for one in judged] == [
            one.text if one.text == right else "" for one, right in zip(decoded, wanted)
        ]
        assert model.decoded == before
        assert all(one.target_nll is not None for one in judged)


def test_an_answer_longer_than_allowed_is_cut_where_decoding_would() -> None:
    long = (3,) * 200
    model = Hashing(0, 1.0, {(1, 2): (*long, END)})
    decodings: tuple[Decoding, ...] = ("draft", "plain")
    for decoding in decodings:
        (said,) = answer.answer(model, ask([(1, 2)], [long]), Letters(), decoding)
        assert len(said.text) == TASK.decoding.max_tokens


def test_the_likeliest_choice_is_chosen() -> None:
    example = Example("", "question", "B", ("A", "B", "C", "D"), {})
    (question,) = answer.questions(task.load("medmcqa"), [example], _chatty())
    model = Hashing(0, 1.0, {question.prompt: question.choices[1]})
    (said,) = answer.answer(model, [(question, None)], _chatty())
    assert (said.choice, model.decoded) == ("B", 0)


def _chatty() -> Any:
    made = Letters()
    made.chat_template = "x"  # type: ignore[assignment]
    made.apply_chat_template = lambda messages, **how: messages[0]["content"]  # type: ignore[attr-defined]
    return made


def test_a_merging_tokenizer_gets_the_target_alone() -> None:
    """If prompt and target would share a token, the prompt stays as it is."""

    class Merging(Letters):
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [9] if text == "ab" else super().__call__(text, add_special_tokens)["input_ids"]}

    alone = Letters()("b", False)["input_ids"]
    assert answer._continuation(Merging(), "a", (3,), "b", False) == tuple(alone)
