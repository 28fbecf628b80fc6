"""Fetching real data: records become pairs, whole files only, one sentence where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from data import download_data
from data.download_data import SOURCES, DownloadError

RECORDS: dict[str, dict[str, Any]] = {
    "to_czech": {"translation": {"en": "a fox", "cs": "liška"}},
    "text_summary": {"article": "long", "highlights": "short"},
    "table_summary": {"query": "q", "table": {"title": "t", "header": ["a"], "rows": [["1"]]}, "summary": "s"},
    "sql": {"context": "CREATE", "question": "q", "answer": "SELECT"},
    "code": {"text": "add", "code": "a + b"},
    "maths": {"question": "1 + 1", "answer": "2"},
    "medical": {"question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2},
    "safety": {"prompt": "p", "is_safe": False},
}


@pytest.mark.parametrize("task", RECORDS)
def test_records_become_lines(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_data, "load_split", lambda source, split: [RECORDS[task]] * 5)
    assert download_data.main([task, "--output", str(tmp_path), "--limit", "3"]) == 0
    for split in ("train", "eval"):
        rows = [json.loads(line) for line in (tmp_path / task / f"{split}.jsonl").read_text().splitlines()]
        assert len(rows) == 3
        assert all(row["prompt"] and row["completion"] and row["task"] == task for row in rows)


def test_the_medical_answer_is_the_marked_option() -> None:
    assert SOURCES["medical"].pair(RECORDS["medical"])[1] == "C. c"


def test_a_broken_run_resumes_at_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(source: download_data.Source, split: str) -> Iterable[dict[str, Any]]:
        asked.append(split)
        yield RECORDS["maths"]
        if split == "test" and asked.count("test") == 1:
            raise DownloadError("the line broke.")

    monkeypatch.setattr(download_data, "load_split", load)
    assert download_data.main(["maths", "--output", str(tmp_path)]) == 1
    assert not (tmp_path / "maths" / "eval.jsonl").exists()
    assert download_data.main(["maths", "--output", str(tmp_path)]) == 0
    assert asked == ["train", "test", "test"]
    assert (tmp_path / "maths" / "eval.jsonl").exists()


def test_no_network_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(*arguments: object, **options: object) -> None:
            raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert download_data.main(["maths", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("download_data: could not fetch openai/gsm8k: ConnectionError; check")
    assert "HF_TOKEN" in said


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert download_data.main(["maths", "--output", str(tmp_path)]) == 1
    assert "pip install 'inlaid[eval]'" in capsys.readouterr().err


def test_an_unknown_task_is_refused_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        download_data.main(["poetry"])
    assert exit_.value.code == 2
    assert "unknown task poetry; choose from to_czech" in capsys.readouterr().err


def test_the_script_passes_its_arguments_on() -> None:
    script = Path(download_data.__file__).parent / "download.sh"
    environment = {**os.environ, "INLAID_PYTHON": sys.executable}
    done = subprocess.run(["bash", script, "poetry"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "unknown task poetry" in done.stderr
