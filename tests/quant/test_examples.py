"""Lines of data as people have them, and what a line that cannot be read is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlaid.quant.examples import CalibrationError, Example, read_examples

ASKED = (("user", "who"),)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "who", "completion": "she"}, (ASKED, "she")),
        ({"question": "who", "answer": "she", "id": 7}, (ASKED, "she")),
        ({"prompt": "who", "response": "she", "task": "names"}, (ASKED, "she")),
        ({"prompt": "who", "output": "she", "cases": []}, (ASKED, "she")),
        ({"prompt": "who", "completion": "she is 3", "answer": 3}, (ASKED, "she is 3")),
        ({"prompt": "who"}, (ASKED, "")),
        ({"text": "who"}, (ASKED, "")),
        (
            {"messages": [{"role": "user", "content": "who"}, {"role": "assistant", "content": "she"}]},
            (ASKED, "she"),
        ),
    ],
)
def test_lines_as_people_have_them(row: dict[str, Any], expected: tuple[Any, str], tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"\n{json.dumps(row)}\n")
    (example,) = read_examples(path)
    assert (example.turns, example.answer) == expected
    assert example.where == f"{path}, line 2"
    assert example.is_chat == ("messages" in row)
    assert isinstance(example, Example)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no examples"),
        ("\n\n", "holds no examples"),
        ('{"prompt": "a"}\nnot json', "line 2 is not JSON"),
        ('{"prompt": ""}', "line 1 has no text"),
        ('{"prompt": 3}', "line 1 has no text"),
        ('["prompt"]', "line 1 has no text"),
        ('{"completion": "a"}', "line 1 has no text in a field 'prompt'"),
        ('{"prompt": "a", "text": "b"}', "or has several"),
        ('{"prompt": "a", "completion": 1}', "'completion' is not text"),
        ('{"prompt": "a", "anwser": "b"}', "line 1: its field 'anwser' is not known; give `prompt` with"),
        ('{"prompt": "a", "answer": "b", "output": "c"}', "both 'answer' and 'output'"),
        ('{"messages": [], "answer": "b"}', "has `messages` and 'answer'"),
        ('{"messages": "hi"}', "must be a list of turns"),
        ('{"messages": [{"role": "user", "content": 1}]}', "must be a list of turns"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "must be the assistant's answer"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(CalibrationError, match=words):
        read_examples(tmp_path / "data.jsonl")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_examples(tmp_path / "nowhere")
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="as text"):
        read_examples(tmp_path / "data.jsonl")
