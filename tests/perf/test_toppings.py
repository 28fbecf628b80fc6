"""Toppings' command: a server in one mode under the artifact's client, its table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf import toppings

DEMO = [str(toppings.DEMO / "adapters" / name) for name in ("maths", "code")]


@pytest.mark.long
def test_a_mode_is_measured_with_every_request_for_a_cold_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    flags = ["--modes", "on-demand", "--max-loras", "1", "--requests", "2", "--adapters", *DEMO, "--out", str(out)]
    assert toppings.main(flags) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["mode"], row["places"], row["requests"]) == ("on-demand", 1, 2)
    assert row["mean_ms"] >= row["first_token_ms"] > 0
    assert row["adapter_ms"] > 0, "it had to be loaded"
    parts = sum(row[f"adapter_{part}_ms"] for part in ("read", "copy", "wait"))
    assert parts == pytest.approx(row["adapter_ms"], abs=0.01)
    assert "| mode | places | requests | mean ms | total s | queue ms |" in capsys.readouterr().out


def test_the_table_has_the_figures_that_there_are() -> None:
    rows = [
        {"mode": mode, "places": 3, "requests": 60, "mean_ms": 1.0, "total_s": 2.0} for mode in ("cached", "pipelined")
    ]
    rows[1]["adapter_ms"] = 3.0
    head, _, first, second = toppings.table(rows).splitlines()
    assert head == "| mode | places | requests | mean ms | total s | adapter ms |"
    assert first == "| cached | 3 | 60 | 1.00 | 2.00 | - |"
    assert second == "| pipelined | 3 | 60 | 1.00 | 2.00 | 3.00 |"


def test_what_would_measure_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert toppings.main(["--max-loras", "2", "--adapters", *DEMO]) == 2
    assert "none would ever be loaded" in capsys.readouterr().err
    assert toppings.main(["--adapters", "nowhere/*"]) == 2
