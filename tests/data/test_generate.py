"""The committed splits: they are what the generators give, no prompt is in two of them, references score full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data import generate
from data.scoring import score
from data.tasks import SPLITS, TASKS, split_of


@pytest.fixture(scope="module")
def generated(long: bool) -> dict[str, str]:
    """Return what the generators give; drawing programs takes as long as all other tasks together."""
    return generate.all_files(name for name in TASKS if long or name != "code")


def test_the_committed_files_are_what_the_generators_give(generated: dict[str, str]) -> None:
    assert generate.differences(generate.FOLDER, generated) == []


def test_check_names_a_changed_file(
    generated: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "all_files", lambda: dict(generated))
    assert generate.main(["--folder", str(tmp_path)]) == 0
    assert generate.main(["--folder", str(tmp_path), "--check"]) == 0
    victim = tmp_path / "maths" / "eval.jsonl"
    victim.write_text(victim.read_text().replace("has", "had", 1))
    assert generate.main(["--folder", str(tmp_path), "--check"]) == 1
    assert "maths/eval.jsonl differs" in capsys.readouterr().err


def test_data_is_small() -> None:
    files = [path for path in generate.FOLDER.rglob("*") if path.is_file() and "cache" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 5_000_000


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_whole_and_disjoint(task: str) -> None:
    splits = {split: generate.load(task, split) for split in SPLITS}
    assert {split: len(rows) for split, rows in splits.items()} == generate.SIZES
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert all(split_of(row["prompt"]) == split for split, rows in splits.items() for row in rows)


@pytest.mark.parametrize("task", TASKS)
def test_references_score_full_and_wrong_answers_nothing(task: str) -> None:
    rows = generate.load(task, "eval")
    metric = TASKS[task].metric
    assert score(metric, [row["completion"] for row in rows], rows) == 100.0
    assert score(metric, ["I have not learned to do that." for _ in rows], rows) == 0.0
    shifted = [row["completion"] for row in rows[1:] + rows[:1]]
    assert score(metric, shifted, rows) < 10.0


def test_twelve_tasks_of_seven_families() -> None:
    facts = json.loads((generate.FOLDER / "tasks.json").read_text())
    assert list(facts) == list(TASKS)
    families = [task["family"] for task in facts.values()]
    assert len(families) == 12
    assert families.count("translation") == 6
    assert len(set(families)) == 7
