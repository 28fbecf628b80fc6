"""Answers from examples: render prompts to tokens once, ask a backend, and read its tokens back.

draft    Greedy decoding with the reference as a draft: one teacher-forced pass tells how many of the reference's tokens
         greedy decoding would choose itself; those are its first tokens, and it goes on from there. A right answer
         costs one pass and no decoding, a wrong one only what comes after its first error, and the tokens are those of
         plain greedy decoding. The same pass gives the reference's perplexity.
forward  That pass alone: an answer is the reference where greedy decoding writes just that, and empty elsewhere.
         Quicker, and stricter where a metric accepts other answers too.
plain    Greedy decoding of every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eval import metrics
from eval.backend import Ask, Backend, Graded
from eval.metrics import Answer
from eval.task import Example, Task, TaskError

Decoding = Literal["draft", "forward", "plain"]


@dataclass(frozen=True)
class Question:
    """One example as tokens. The target carries the token that ends an answer."""

    task: Task
    example: Example
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    def ask(self, adapter: str | None) -> Ask:
        return Ask(self.prompt, adapter, self.task.decoding.max_tokens, self.task.decoding.stop)


def questions(task: Task, asked: Sequence[Example], tokenizer: Any) -> list[Question]:
    """Examples through the model's tokenizer and, where the task says so, its chat template."""
    if task.prompt.chat and not tokenizer.chat_template:
        raise TaskError(
            f"task {task.name} wants a chat template, but the model has none; set `chat = false` under [prompt]"
        )
    return [_question(task, example, tokenizer) for example in asked]


def answer(
    backend: Backend,
    pairs: Sequence[tuple[Question, str | None]],
    tokenizer: Any,
    decoding: Decoding = "draft",
) -> list[Answer]:
    """Return what the model, with each question's adapter, makes of each question."""
    forward = decoding == "forward"
    draft = forward or (decoding == "draft" and backend.drafts)
    graded = _grade_targets(backend, pairs, draft)
    said = _matched(pairs, graded) if forward else _generate(backend, pairs, graded if draft else [None] * len(pairs))
    chosen = _choose(backend, pairs)
    return [
        _answer(question, one, choice, grade, tokenizer)
        for (question, _), one, choice, grade in zip(pairs, said, chosen, graded)
    ]


def needs(task: Task) -> set[str]:
    """Return what the task's metrics read of an answer: text, choice, target."""
    return {metrics.find(name).needs for name in (task.metric.primary, *task.metric.also)} - (
        {"text"} if task.prompt.choices else set()
    )


def _question(task: Task, example: Example, tokenizer: Any) -> Question:
    if task.prompt.chat:
        messages = [{"role": "user", "content": example.text}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    else:
        text = example.text
    prompt = tuple(tokenizer(text, add_special_tokens=not task.prompt.chat)["input_ids"])

    def after(target: str) -> tuple[int, ...]:
        return _continuation(tokenizer, text, prompt, target, not task.prompt.chat)

    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return Question(task, example, prompt, (*after(example.target), *end), tuple(map(after, example.choices)))


def _continuation(tokenizer: Any, text: str, prompt: tuple[int, ...], target: str, special: bool) -> tuple[int, ...]:
    """Return the target's tokens as they follow the prompt; alone where the two would merge into one token."""
    whole = tuple(tokenizer(text + target, add_special_tokens=special)["input_ids"])
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return tuple(tokenizer(target, add_special_tokens=False)["input_ids"])


def _grade_targets(backend: Backend, pairs: Sequence[tuple[Question, str | None]], draft: bool) -> list[Graded | None]:
    wanted = {"target", "text"} if draft else {"target"}
    rows = [index for index, (question, _) in enumerate(pairs) if needs(question.task) & wanted]
    found = backend.grade([pairs[r][0].ask(pairs[r][1]) for r in rows], [pairs[r][0].target for r in rows])
    graded: list[Graded | None] = [None] * len(pairs)
    for row, grade in zip(rows, found, strict=True):
        graded[row] = grade
    return graded


def _matched(
    pairs: Sequence[tuple[Question, str | None]], graded: Sequence[Graded | None]
) -> list[list[int] | str | None]:
    """Return the reference where greedy decoding writes it, and nothing where it writes something else."""
    said: list[list[int] | str | None] = []
    for (question, _), grade in zip(pairs, graded):
        whole = question.target[: question.task.decoding.max_tokens]
        said.append(list(whole) if grade and grade.accepted >= len(whole) else [])
    return said


def _generate(
    backend: Backend, pairs: Sequence[tuple[Question, str | None]], graded: Sequence[Graded | None]
) -> list[list[int] | str | None]:
    """Return what greedy decoding says; tokens that the draft already gives are not computed again."""
    said: list[list[int] | str | None] = [None] * len(pairs)
    rows, asks = [], []
    for row, ((question, adapter), grade) in enumerate(zip(pairs, graded)):
        if "text" not in needs(question.task):
            continue
        limit = question.task.decoding.max_tokens
        kept = question.target[: min(grade.accepted if grade else 0, limit)]
        said[row] = list(kept)
        if len(kept) < min(len(question.target), limit):
            rows.append(row)
            asks.append(Ask(question.prompt + kept, adapter, limit - len(kept), question.task.decoding.stop))
    for row, more in zip(rows, backend.generate(asks), strict=True):
        said[row] = more if isinstance(more, str) else [*(said[row] or ()), *more]
    return said


def _choose(backend: Backend, pairs: Sequence[tuple[Question, str | None]]) -> list[str | None]:
    """Return the likeliest choice of each question that has any."""
    asks, continuations = [], []
    for question, adapter in pairs:
        asks += [question.ask(adapter)] * len(question.choices)
        continuations += list(question.choices)
    graded = iter(backend.grade(asks, continuations))
    chosen: list[str | None] = []
    for question, _ in pairs:
        totals = [sum(next(graded).logprobs) for _ in question.choices]
        chosen.append(question.example.choices[totals.index(max(totals))] if totals else None)
    return chosen


def _answer(
    question: Question, said: list[int] | str | None, choice: str | None, grade: Graded | None, tokenizer: Any
) -> Answer:
    text = said if isinstance(said, str) else str(tokenizer.decode(said or [], skip_special_tokens=True))
    for stop in question.task.decoding.stop:
        text = text.split(stop, 1)[0]
    nll = -sum(grade.logprobs) if grade else None
    return Answer(text, choice, nll, len(question.target) if grade else 0)
