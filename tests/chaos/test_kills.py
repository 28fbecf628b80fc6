"""Kills of the engine and of the server at random: what was answered holds."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.kills import Kills


def test_what_was_answered_outlives_kills_of_engine_and_server(tmp_path: Path) -> None:
    kills = Kills(tmp_path, seed=3)
    kills.run(kills=4, seconds=120.0)
    assert kills.faults == []
    assert kills.counts["kills of the server"] >= 1
    assert kills.counts["kills of the engine"] >= 1
    assert kills.counts["changes"] > 0
