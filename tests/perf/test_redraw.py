"""Figures are drawn anew only from runs that give the recorded values again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inlaid.sim import command
from perf import redraw


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with one record, and let the simulator give the same values at once."""
    row = {"policy": "fcfs", "throughput": 3.5}
    asked = "python -m inlaid.sim.command --suite small,large --policy fcfs --out .inlaid/sim"
    record = {"suite": "small", "command": asked, "lengths": "history", "machine": "a10g", "seed": 7, "rows": [row]}
    (tmp_path / "sim-small.json").write_text(json.dumps(record))
    (tmp_path / "sim-other.json").write_text("{}")

    def run(arguments: list[str]) -> int:
        flags = dict(zip(arguments[::2], arguments[1::2], strict=True))
        assert (flags["--suite"], flags["--policy"], flags["--seed"]) == ("small", "fcfs", "7")
        Path(flags["--out"], "small.json").write_text(json.dumps({"rows": [{**row, "later": 1}]}))
        Path(flags["--out"], "small.png").write_bytes(b"drawn")
        return 0

    monkeypatch.setattr(command, "main", run)
    return tmp_path


def test_a_figure_is_replaced_and_its_record_stays(results: Path) -> None:
    before = (results / "sim-small.json").read_bytes()
    assert redraw.main(["--results", str(results)]) == 0
    assert (results / "sim-small.png").read_bytes() == b"drawn"
    assert (results / "sim-small.json").read_bytes() == before


def test_other_values_are_told_and_leave_the_figure(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((results / "sim-small.json").read_text())
    record["rows"][0]["throughput"] = 3.6
    (results / "sim-small.json").write_text(json.dumps(record))
    assert redraw.main(["--results", str(results)]) == 1
    assert "small: the figure was left as it is, values differ: fcfs: throughput" in capsys.readouterr().err
    assert not (results / "sim-small.png").exists()


def test_an_unknown_suite_is_refused(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert redraw.main(["large", "--results", str(results)]) == 2
    assert "no record of large; there are small" in capsys.readouterr().err
