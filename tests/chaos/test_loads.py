"""Adapters loaded, swapped, unloaded and asked at random: no wrong token, not a byte left."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.loads import Loads


def test_adapters_that_come_and_go_leave_no_wrong_token_and_no_byte(tmp_path: Path) -> None:
    found = Loads(tmp_path, seed=1).run(changes=150, seconds=120.0)
    assert found["faults"] == []
    assert found["answers"] > 0
    assert set(found["left"].values()) == {0}
