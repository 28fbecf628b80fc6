"""Fetching real data: records become pairs, whole files only, one sentence where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data import download_data
from eval import hub, task

ROWS: dict[str, dict[str, Any]] = {
    "wmt16_cs": {"translation": {"en": "a fox", "cs": "liška"}},
    "cnn_dailymail": {"article": "long", "highlights": "short"},
    "qtsumm": {"query": "q", "table": {"title": "t", "header": ["a"], "rows": [["1"]]}, "summary": "s"},
    "sql_create_context": {"context": "CREATE", "question": "q", "answer": "SELECT"},
    "mbpp": {"prompt": "add", "code": "a + b", "test_list": ["assert True"], "test_imports": []},
    "gsm8k": {"question": "1 + 1", "answer": "2"},
    "medmcqa": {"question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2},
    "toxic_chat": {"user_input": "p", "toxicity": 1},
}
Load = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture
def from_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Load], None]:
    """Put a function of data set and split in the place of the hub."""

    def replace(load: Load) -> None:
        monkeypatch.setattr(hub, "rows", lambda name, config, split, revision, limit: load(name, split)[:limit])

    return replace


@pytest.mark.parametrize("name", ROWS)
def test_rows_become_lines(name: str, tmp_path: Path, from_hub: Callable[[Load], None]) -> None:
    from_hub(lambda data_set, split: [ROWS[name]] * 5)
    assert download_data.main([name, "--output", str(tmp_path), "--limit", "3"]) == 0
    for split in ("train", "eval"):
        lines = [json.loads(line) for line in (tmp_path / name / f"{split}.jsonl").read_text().splitlines()]
        assert len(lines) == 3
        assert all(line["prompt"] and line["completion"] and line["task"] == name for line in lines)


def test_lines_are_what_evaluating_asks(tmp_path: Path, from_hub: Callable[[Load], None]) -> None:
    """The option that is marked as right is the completion, and the prompt is the task's own."""
    from_hub(lambda data_set, split: [ROWS["medmcqa"]])
    assert download_data.main(["medmcqa", "--output", str(tmp_path)]) == 0
    line = json.loads((tmp_path / "medmcqa/train.jsonl").read_text())
    assert line["completion"] == "C"
    assert "C. c" in line["prompt"]


def test_there_is_one_list_of_real_tasks() -> None:
    known = download_data.real_tasks()
    assert list(known) == [name for name in task.names() if task.load(name).data.hub]
    assert len(known) == 13


def test_a_broken_run_resumes_at_its_file(tmp_path: Path, from_hub: Callable[[Load], None]) -> None:
    asked: list[str] = []

    def load(data_set: str, split: str) -> list[dict[str, Any]]:
        asked.append(split)
        if split == "test" and asked.count("test") == 1:
            raise hub.HubError("the line broke.")
        return [ROWS["gsm8k"]]

    from_hub(load)
    assert download_data.main(["gsm8k", "--output", str(tmp_path)]) == 1
    assert not (tmp_path / "gsm8k" / "eval.jsonl").exists()
    assert download_data.main(["gsm8k", "--output", str(tmp_path)]) == 0
    assert asked == ["train", "test", "test"]
    assert (tmp_path / "gsm8k" / "eval.jsonl").exists()


def test_a_row_that_cannot_be_rendered_leaves_no_file(tmp_path: Path, from_hub: Callable[[Load], None]) -> None:
    from_hub(lambda data_set, split: [ROWS["gsm8k"], {"question": "without an answer"}])
    assert download_data.main(["gsm8k", "--output", str(tmp_path)]) == 1
    assert not (tmp_path / "gsm8k" / "train.jsonl").exists()


def test_without_names_everything_is_tried_and_the_last_line_sums_up(
    tmp_path: Path, from_hub: Callable[[Load], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def load(data_set: str, split: str) -> list[dict[str, Any]]:
        if data_set == "yale-nlp/QTSumm":
            raise hub.HubError("accept its terms first.")
        if data_set == "wmt/wmt16":
            return [{"translation": dict.fromkeys(("en", "cs", "de", "fi", "ro", "ru", "tr"), "a fox")}]
        return next([row] for name, row in ROWS.items() if task.load(name).data.hub == data_set)

    from_hub(load)
    assert download_data.main(["--output", str(tmp_path)]) == 1
    said = capsys.readouterr()
    failures = [line for line in said.err.splitlines() if "download_data" in line]
    assert failures == ["download_data: accept its terms first."]
    assert said.out.splitlines()[-1].startswith("download_data: fetched 12 of 13; failed: qtsumm (run")


def test_no_network_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(*arguments: object, **options: object) -> None:
            raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert download_data.main(["gsm8k", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("download_data: could not fetch openai/gsm8k: ConnectionError; check")
    assert "HF_TOKEN" in said


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert download_data.main(["gsm8k", "--output", str(tmp_path)]) == 1
    assert "bash install.sh eval" in capsys.readouterr().err


def test_an_unknown_task_is_refused_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        download_data.main(["poetry"])
    assert exit_.value.code == 2
    assert "unknown task poetry; choose from cnn_dailymail" in capsys.readouterr().err


def test_the_script_passes_its_arguments_on() -> None:
    script = Path(download_data.__file__).parent / "download.sh"
    environment = {**os.environ, "INLAID_PYTHON": sys.executable}
    done = subprocess.run(["bash", script, "poetry"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "unknown task poetry" in done.stderr
