"""Tasks of one's own from a bare file: what is read, what is refused, and how answers are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval import metrics, own, run
from eval.metrics import Answer
from eval.task import TaskError


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "who", "completion": "she"},
        {"question": "who", "answer": "she", "id": 7},
        {"prompt": "who", "response": "she"},
        {"prompt": "who", "output": "she"},
        {"messages": [{"role": "user", "content": "who"}, {"role": "assistant", "content": "she"}]},
    ],
)
def test_lines_as_people_have_them(row: dict[str, Any], tmp_path: Path) -> None:
    task, (example,) = own.load(f"mine={write(tmp_path, row)}:contains", None)
    assert (task.name, task.metric.primary) == ("mine", "contains")
    assert (example.text, example.target) == ("who", "she")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "who", "anwser": "she"}, "line 1: its field 'anwser' is not known"),
        ({"prompt": "who"}, "line 1 needs an answer to compare with"),
        ({"prompt": "who", "answer": "a", "output": "b"}, "line 1 has both 'answer' and 'output'"),
        (
            {"messages": [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]},
            "line 1 needs an answer to compare with, and a single prompt",
        ),
        ([1], "line 1 has no text"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(row: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=reason):
        own.load(f"mine={write(tmp_path, row)}:exact", None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mine", "write NAME=FILE.jsonl:METRIC"),
        ("mine=lines.jsonl", "write NAME=FILE.jsonl:METRIC"),
        ("mine=/nowhere.jsonl:exact", "/nowhere.jsonl cannot be read"),
        ("mine=/nowhere.jsonl:poetry", "no metric 'poetry'; known: "),
        ("mine=/nowhere.jsonl:nowhere.judge", "must be a function that Python can import"),
        ("mine=/nowhere.jsonl:pass_at_1", "needs a task file"),
    ],
)
def test_a_wrong_option_is_told(text: str, reason: str) -> None:
    with pytest.raises(TaskError, match=reason):
        own.load(text, None)


@pytest.mark.parametrize(
    ("metric", "right", "said", "points"),
    [
        ("contains", "Paris", "It is paris.", 100),
        ("contains", "Paris", "It is Rome.", 0),
        ("regex", r"\b4[0-9]\b", "about 42", 100),
        ("regex", r"\b4[0-9]\b", "about 142", 0),
        ("json_equal", '{"a": 1, "b": [2]}', '```json\n{"b": [2], "a": 1}\n```', 100),
        ("json_equal", '{"a": 1}', "a is 1", 0),
        ("json_equal", '{"a": 1}', '{"a": true}', 0),
        ("f1", "a b", "b c", 50),
    ],
)
def test_metrics_for_bare_files(metric: str, right: str, said: str, points: float, tmp_path: Path) -> None:
    task, examples = own.load(f"mine={write(tmp_path, {'prompt': 'x', 'answer': right})}:{metric}", None)
    assert metrics.score(metrics.find(metric), task, [Answer(said)], examples) == pytest.approx(points)


def test_a_python_function_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judge.py").write_text("def longer(said, line):\n    return len(said) > len(line['answer'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    task, examples = own.load(f"mine={write(tmp_path, {'prompt': 'x', 'answer': 'yes'})}:my_judge.longer", None)
    assert metrics.score(metrics.find(task.metric.primary), task, [Answer("longer")], examples) == 100


def test_a_missing_package_is_told_before_any_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "_is_installed", lambda package: package != "rouge_score")
    lines = write(tmp_path, {"prompt": "x", "answer": "y"})
    arguments = ["--task", f"mine={lines}:rouge2", "--variants", "fp16", "--cache", str(tmp_path / "cache")]
    assert run.main([*arguments, "--out", str(tmp_path / "report"), "--workers", "0"]) == 2
    assert "metric rouge2 needs the package rouge_score: bash install.sh eval" in capsys.readouterr().err
    assert not (tmp_path / "cache" / "answers").exists()


def test_an_own_task_is_evaluated_with_its_adapter(tmp_path: Path) -> None:
    """Lines of the demo's data as a bare file: the report is that of the task itself."""
    rows = [json.loads(line) for line in (run.ROOT / "data/to_velar/eval.jsonl").read_text().splitlines()[:3]]
    lines = write(tmp_path, *({"question": row["prompt"], "answer": row["completion"]} for row in rows))
    adapter = f"mine={run.ROOT / 'models/demo/adapters/to_velar'}"
    arguments = ["--task", f"mine={lines}:exact", "--adapter", adapter, "--variants", "fp16", "--no-figures"]
    arguments += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "report"), "--workers", "0"]
    assert run.main(arguments) == 0
    (record,) = json.loads((tmp_path / "report.json").read_text())["records"]
    assert (record["task"], record["adapter"], record["metric"], record["score"]) == (
        "mine",
        "mine",
        "exact_match",
        100,
    )
