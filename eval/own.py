"""Tasks of one's own from a bare file: `--task NAME=FILE.jsonl:METRIC`, without a task file.

Each line has a prompt and the right answer: `prompt` (or `question`) with `completion`, `answer`, `response` or
`output`; or `messages`, a user's turn and the assistant's. Other fields than `id` and `task` are refused, so that a
misspelt answer is not overlooked. The metric is one of `eval.metrics`, or a Python function MODULE.NAME of the answer's
text and the line, which returns a number from 0 to 1 (or a truth value).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval import metrics
from eval.task import Data, Decoding, Example, MetricNames, Prompt, Task, TaskError

PROMPTS = ("prompt", "question")
ANSWERS = ("completion", "answer", "response", "output")
OTHERS = ("id", "messages", "task")
MAX_TOKENS = 256
SHORT_NAMES = (("exact", "exact_match"),)


def load(text: str, limit: int | None) -> tuple[Task, list[Example]]:
    """Read NAME=FILE:METRIC into a task and its first `limit` examples."""
    name, equals, rest = text.partition("=")
    file, colon, metric = rest.rpartition(":")
    if not (name and equals and file and colon and metric):
        raise TaskError(
            f"--task {text}: write NAME=FILE.jsonl:METRIC; metrics: {', '.join(metrics.METRICS)}, or a function"
        )
    metric = dict(SHORT_NAMES).get(metric, metric)
    if metric in ("choice_accuracy", "pass_at_1"):
        raise TaskError(f"--task {text}: {metric} needs a task file, see eval/task.py")
    metrics.find(metric)
    task = Task(
        name=name,
        family=name,
        licence="not stated",
        data=Data(file=str(Path(file).resolve())),
        prompt=Prompt(text="{{ prompt }}", target="{{ answer }}"),
        decoding=Decoding(max_tokens=MAX_TOKENS),
        metric=MetricNames(primary=metric),
    )
    return task, _examples(Path(file), limit)


def _examples(file: Path, limit: int | None) -> list[Example]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"--task: {file} cannot be read as text: {error}") from error
    found: list[Example] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (limit is None or len(found) < limit):
            found.append(_example(f"{file}, line {number}", number, line))
    if not found:
        raise TaskError(f"--task: {file} has no lines")
    return found


def _example(where: str, number: int, line: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TaskError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise TaskError(f"{where} is not a JSON object")
    if unknown := set(row) - {*PROMPTS, *ANSWERS, *OTHERS}:
        raise TaskError(f"{where}: field {sorted(unknown)[0]!r} is not known; {_expected()}")
    prompt, answer = _of_messages(where, row["messages"]) if "messages" in row else _pair(where, row)
    return Example(str(row.get("id", number)), prompt, answer, (), row)


def _pair(where: str, row: Mapping[str, Any]) -> tuple[str, str]:
    texts = []
    for names in (PROMPTS, ANSWERS):
        given = [name for name in names if name in row]
        if len(given) != 1 or not isinstance(row[given[0]], str):
            raise TaskError(f"{where} needs text in one of the fields {', '.join(names)}; {_expected()}")
        texts.append(row[given[0]])
    return texts[0], texts[1]


def _of_messages(where: str, messages: Any) -> tuple[str, str]:
    """Return the question and the answer of a conversation of one turn: what a task asks."""
    turns = messages if isinstance(messages, list) else []
    said = {turn.get("role"): turn.get("content") for turn in turns if isinstance(turn, dict)}
    question, answer = said.get("user"), said.get("assistant")
    if len(turns) != 2 or not isinstance(question, str) or not isinstance(answer, str):
        raise TaskError(f"{where}: `messages` must be a user's turn and the assistant's answer, both text")
    return question, answer


def _expected() -> str:
    return f"give {' or '.join(PROMPTS)} and {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}, or `messages`"
