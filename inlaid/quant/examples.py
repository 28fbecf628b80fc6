"""Lines of a task's data as people have them, each refused by file and line where it cannot be read.

One JSON object a line, in one of these forms:

    {"prompt": …, "completion": …}   or `question` for the prompt; `answer`, `response` or `output` for the completion
    {"messages": [{"role": …, "content": …}, …]}   a conversation, the last turn of which is the assistant's
    {"prompt": …} or {"text": …}   running text without an answer

Other fields than `id`, `task` and `cases` are refused, so that a misspelt answer is not overlooked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = ("prompt", "question", "text")
ANSWERS = ("completion", "answer", "response", "output")
OTHERS = ("id", "task", "cases")


class CalibrationError(ValueError):
    """The data of a task cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Example:
    """The turns before an answer, as (role, text), and the answer; empty where there is none."""

    turns: tuple[tuple[str, str], ...]
    answer: str
    where: str = "an example"  # file and line
    is_chat: bool = False  # came as `messages`, and needs the model's chat template

    @property
    def prompt(self) -> str:
        """Return the text of the last turn before the answer."""
        return self.turns[-1][1]


def read_examples(path: Path) -> list[Example]:
    """Read the lines of a file, and check each."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as text: {error}") from error
    examples = list(_parsed(path, lines))
    if not examples:
        raise CalibrationError(f"{path} holds no examples; give one JSON object with a 'prompt' per line")
    return examples


def _parsed(path: Path, lines: list[str]) -> Iterator[Example]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CalibrationError(f"{where} is not JSON: {error}") from error
            yield parse(row, where)


def parse(row: Any, where: str) -> Example:
    """Return the example of one line; `where` names the line in a refusal."""
    if not isinstance(row, dict):
        raise CalibrationError(f"{where} has no text in a field 'prompt': it is no JSON object")
    if unknown := sorted(set(row) - {*PROMPTS, *ANSWERS, *OTHERS, "messages"}):
        raise CalibrationError(f"{where}: its field {unknown[0]!r} is not known; {_forms()}")
    if "messages" in row:
        if beside := sorted(set(row) & {*PROMPTS, *ANSWERS}):
            raise CalibrationError(f"{where} has `messages` and {beside[0]!r}: keep one of them")
        return _conversation(row, where)
    prompts = [name for name in PROMPTS if name in row]
    if len(prompts) != 1 or not isinstance(row[prompts[0]], str) or not row[prompts[0]]:
        raise CalibrationError(f"{where} has no text in a field 'prompt' (or has several); {_forms()}")
    given = [name for name in ANSWERS if name in row]
    answers = [name for name in given if isinstance(row[name], str)]  # a number beside it is for people
    if given and not answers:
        raise CalibrationError(f"{where}: its {given[0]!r} is not text")
    if len(answers) > 1:
        raise CalibrationError(f"{where} has both {answers[0]!r} and {answers[1]!r}: keep the one that is the answer")
    return Example((("user", row[prompts[0]]),), row[answers[0]] if answers else "", where)


def _conversation(row: Mapping[str, Any], where: str) -> Example:
    listed = row["messages"] if isinstance(row["messages"], list) else []
    turns = [(turn.get("role"), turn.get("content")) for turn in listed if isinstance(turn, dict)]
    if not turns or len(turns) != len(listed) or not all(isinstance(part, str) for turn in turns for part in turn):
        raise CalibrationError(f"{where}: `messages` must be a list of turns with the texts role and content")
    if len(turns) < 2 or turns[-1][0] != "assistant" or not turns[-1][1]:
        raise CalibrationError(f"{where}: the last of its `messages` must be the assistant's answer to an earlier one")
    return Example(tuple((str(role), str(text)) for role, text in turns[:-1]), str(turns[-1][1]), where, is_chat=True)


def _forms() -> str:
    return "give `prompt` with `completion`, `answer`, `response` or `output`, or `messages`, or `text`"
