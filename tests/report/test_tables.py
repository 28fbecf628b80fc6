"""Markdown tables."""

from __future__ import annotations

from inlaid.report import tables


def test_the_last_alignment_holds_for_the_columns_that_follow() -> None:
    table = tables.markdown(("name", "a", "b"), [("x", 1, "2.0"), ("y", "", None)])
    assert table == "| name | a | b |\n|---|---:|---:|\n| x | 1 | 2.0 |\n| y |  | None |"


def test_each_column_can_have_its_own_alignment() -> None:
    assert tables.markdown(("a", "b", "c"), [], "rlr").splitlines()[1] == "|---:|---|---:|"
