"""Reports of several runs become the one that a single run would have given."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from eval import merge
from eval.merge import MergeError, merged
from eval.task import ROOT


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "eval/results/demo.json").read_text())
    for row in (*found["records"], *found["summary"]):
        row.setdefault("seed", 0)
    return found


def part(whole: dict[str, Any], *variants: str) -> dict[str, Any]:
    """Return the report as a run of these variants, and of full precision, would have given it."""
    made = deepcopy(whole)
    made["records"] = [record for record in made["records"] if record["variant"] in ("fp16", *variants)]
    for record in made["records"]:
        record.pop("p_holm", None)
    return made


def test_parts_make_the_whole(whole: dict[str, Any]) -> None:
    variants = list(dict.fromkeys(record["variant"] for record in whole["records"] if record["variant"] != "fp16"))
    parts = [(Path("one"), part(whole, *variants[:2])), (Path("two"), part(whole, *variants[2:]))]
    made = merged("demo", parts)
    assert made["provenance"]["seconds"] == 2 * whole["provenance"]["seconds"]
    names = ("variant", "bits", "task")
    assert {tuple(record[name] for name in names): record for record in made["records"]} == {
        tuple(record[name] for name in names): record for record in whole["records"]
    }
    assert sorted(made["summary"], key=str) == sorted(whole["summary"], key=str)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("base", "another", "two has base 'another'"), ("examples_per_task", 3, "has examples_per_task 3"),
     ("tasks", {"code": {"licence": "", "fingerprint": ""}}, "task code has other examples")],
)  # fmt: skip
def test_parts_of_something_else_are_refused(whole: dict[str, Any], field: str, value: Any, reason: str) -> None:
    with pytest.raises(MergeError, match=reason):
        merged("demo", [(Path("one"), whole), (Path("two"), {**whole, field: value})])


def test_a_part_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert merge.main([str(tmp_path / "out"), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
