"""The recorded requests of an H200, served again by the simulator: its machine must foretell them within 5%."""

from __future__ import annotations

import json

import pytest

from perf import rounds
from perf.process import ROOT

RECORDED = ROOT / "perf" / "results" / "h200-sched-rounds.json"


def test_the_machine_h200_foretells_what_the_engine_did_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert rounds.main([str(RECORDED), "--machine", "h200"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in found] == ["fcfs", "vtc"]
    for row in found:
        for figure in ("throughput", "ttft", "latency"):
            assert abs(row[f"{figure}_error"]) < 0.05, (row["policy"], figure)


def test_what_is_no_file_of_rounds_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert rounds.main([str(ROOT / "README.md"), "--machine", "h200"]) == 2
    assert rounds.main([str(RECORDED), "--machine", "nowhere"]) == 2
    assert "no machine" in capsys.readouterr().err
