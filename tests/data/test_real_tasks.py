"""The twelve tasks for a real base: reproducible, apart by split, their answers right by rule."""

from __future__ import annotations

import ast
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from data import real_tasks
from data.real_tasks import REAL_TASKS
from data.tasks import DemoTask
from eval import task
from inlaid.quant.examples import read_examples

COUNT = 24


def drawn(one: DemoTask, split: str) -> list[dict[str, Any]]:
    return list(itertools.islice(one.examples(split, "0"), COUNT))


def test_they_are_the_tasks_that_evaluating_has_for_the_base() -> None:
    listed = [one for name in task.names() if (one := task.load(name)).base == "smollm2"]
    assert sorted(one.name for one in listed) == sorted(one.name for one in REAL_TASKS)
    for one in listed:
        assert (one.data.file, one.calibration, one.adapter) == (
            f"data/cache/real/{one.name}/eval.jsonl",
            f"data/cache/real/{one.name}/calibration.jsonl",
            f"models/smollm2/adapters/{one.name}",
        )


@pytest.mark.parametrize("one", REAL_TASKS, ids=lambda one: one.name)
def test_examples_are_reproducible_and_no_prompt_is_in_two_splits(one: DemoTask) -> None:
    first = {split: drawn(one, split) for split in ("train", "eval")}
    assert first["eval"] == drawn(one, "eval")
    assert len({example["prompt"] for examples in first.values() for example in examples}) == 2 * COUNT
    assert all(example["completion"] for examples in first.values() for example in examples)
    if one.metric == "json_equal":
        assert all(json.loads(example["completion"]) for example in first["train"])


def examples(name: str) -> list[dict[str, Any]]:
    return drawn(next(one for one in REAL_TASKS if one.name == name), "train")


@pytest.mark.parametrize("name", ["table_sum", "word_problem"])
def test_arithmetic_is_right(name: str) -> None:
    for example in examples(name):
        for line in example["completion"].splitlines():
            assert re.fullmatch(r"[\d+* =-]+", line)
            left, _, right = line.partition(" = ")
            assert not right or eval(compile(ast.parse(left, mode="eval"), "", "eval")) == int(right)


def test_code_is_python_and_its_mistake_is_one_place() -> None:
    for example in examples("code_repair"):
        broken = example["prompt"].partition("\n")[2]
        ast.parse(broken)
        ast.parse(example["completion"])
        pairs = zip(broken.splitlines(), example["completion"].splitlines(), strict=True)
        assert sum(one != other for one, other in pairs) == 1


def test_files_are_read_as_training_and_calibration_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_tasks, "SIZES", (("train", 3), ("eval", 2)))
    assert real_tasks.main(["--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.iterdir())) == 12
    for folder in tmp_path.iterdir():
        assert [len(read_examples(folder / f"{split}.jsonl")) for split in ("train", "eval")] == [3, 2]
