"""The bound on nesting."""

from __future__ import annotations

import pytest

from inlaid.engine.refusal import Refused
from inlaid.text.nesting import check_depth


def test_nesting_is_bounded_without_recursion() -> None:
    deep: object = 1
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Refused, match="nested more than 64"):
        check_depth("tools", deep)
    check_depth("tools", {"a": [{"b": [1, 2]}] * 100})
    while isinstance(deep, list):  # taken apart by hand: letting go of it recurses
        deep = deep.pop()
