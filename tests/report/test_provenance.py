"""Provenance: what it always has, what is asked for, and what happens without a repository or a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from inlaid.report import provenance as module
from inlaid.report.provenance import provenance


def test_the_fields_are_the_same_for_every_harness() -> None:
    made = provenance(seed=3, packages=("pytest", "no-such-package"))
    assert list(made) == ["version", "commit", "python", "processor", "command", "seed", "packages"]
    assert made["packages"] == {"pytest": pytest.__version__, "no-such-package": None}
    assert re.fullmatch(r"[0-9a-f]{7,}\+?", made["commit"])


def test_a_seed_and_packages_are_left_out_unless_given() -> None:
    assert list(provenance()) == ["version", "commit", "python", "processor", "command"]


def test_the_commit_can_be_named_where_there_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert provenance()["commit"] == ""
    monkeypatch.setenv("INLAID_COMMIT", "abc1234")
    assert provenance()["commit"] == "abc1234"


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.gpu() is None
