"""The report's files: pictures where there is something to draw, tables that name the worst, JSON that is JSON."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from eval import figures, judge, page, report
from inlaid.report.plots import PlotsMissing

TEXT = dict.fromkeys(figures.RADAR, 90.0)


def records() -> list[dict[str, Any]]:
    """Two tasks, full precision and two variants at two widths; `bad` loses ten points of task b at two bits."""
    found = []
    for variant, bits in (("fp16", 16), ("good", 4), ("good", 2), ("bad", 4), ("bad", 2)):
        for task in ("a", "b"):
            drop = 10.0 if (variant, bits, task) == ("bad", 2, "b") else 0.0
            also = {name: value - drop for name, value in TEXT.items()}
            found.append(
                {"variant": variant, "bits": bits, "seed": 0, "task": task, "adapter": task,
                 "metric": "exact_match", "also": also,
                 "score": 95.0 - drop, "drop": drop, "p_holm": 0.01 if drop else 1, "faults": ["dead"] if drop else []}
            )  # fmt: skip
    return found


def whole() -> dict[str, Any]:
    made = {"commit": "c" * 7, "command": "python -m eval.run", "finished": "now", "seconds": 3}
    return {
        "name": "demo",
        "provenance": {**made, "processor": "x", "gpu": None},
        "backend": {"name": "engine", "setting": "y"},
        "examples_per_task": 8,
        "summary": judge.summary(records()),
        "records": records(),
        "differences": [
            {"other": "oracle", "variant": "good", "bits": 4, "task": "a", "adapter": "a", "different_answers": 1,
             "examples": 8, "scores": [90.0, 91.0], "within_interval": True, "first": []}
        ],
    }  # fmt: skip


def test_the_summary_finds_the_worst_task() -> None:
    rows = {(row["variant"], row["bits"]): row for row in judge.summary(records())}
    bad = rows["bad", 2]
    assert (bad["average_drop"], bad["worst_drop"], bad["worst_task"], bad["faults"]) == (5.0, 10.0, "b", ["b"])
    assert rows["good", 2]["worst_drop"] == 0


def test_a_missing_drop_is_left_out_of_the_average() -> None:
    found = [{**record, "drop": None if record["task"] == "a" else 2.0} for record in records()]
    (row, *_) = judge.summary(found)
    assert (row["average_drop"], row["worst_drop"]) == (2.0, 2.0)
    (none, *_) = judge.summary([{**record, "drop": None} for record in found])
    assert (none["average_drop"], none["worst_task"]) == (None, None)


def test_the_page_says_it_all(tmp_path: Path) -> None:
    page = report.markdown(whole(), [tmp_path / "demo-radar.png"])
    assert "| bad | 2 | 90.00 | 5.00 | 10.00 | b |" in page
    assert "| bad | 2 | 0.0 | 10.0* |" in page
    assert "| fp16 | 16 | 95.0 | 95.0 |" in page
    assert "**b** with adapter b: dead" in page
    assert "1 of 8 answers differ from the oracle's" in page
    assert "![demo-radar](demo-radar.png)" in page


def test_figures_are_drawn_where_there_is_something_to_draw(tmp_path: Path) -> None:
    drawn = figures.draw(tmp_path / "demo", records(), judge.summary(records()))
    assert [path.name for path in drawn] == ["demo-heat-map.png", "demo-worst-task.png", "demo-radar.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in drawn)
    alone = [record for record in records() if record["variant"] == "fp16"]
    assert figures.draw(tmp_path / "alone", alone, judge.summary(alone)) == []


def test_without_matplotlib_one_sentence_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotsMissing, match=r"pip install matplotlib.*--no-figures"):
        figures.draw(tmp_path / "demo", records(), judge.summary(records()))


def test_json_holds_no_infinity(tmp_path: Path) -> None:
    report.write_json(tmp_path / "deep" / "r.json", whole())
    assert json.loads((tmp_path / "deep" / "r.json").read_text())["name"] == "demo"
    with pytest.raises(ValueError, match="Out of range float"):
        report.write_json(tmp_path / "r.json", {"score": float("inf")})
    assert not (tmp_path / "r.json").exists()


def test_the_page_has_the_tables_the_faults_and_nothing_to_fetch() -> None:
    made = whole()
    made["name"] = "<b>demo"
    shown = page.html(made)
    assert "<b>demo" not in shown
    assert "&lt;b&gt;demo: accuracy" in shown
    assert "<td>bad</td><td>2</td><td>90.00</td><td>5.00</td><td>10.00</td><td>b</td>" in shown
    assert '<span class="token p3">10.0*</span>' in shown
    assert "<li><b>b</b> with adapter b: dead</li>" in shown
    assert "1 of 8 answers differ from the oracle's." in shown
    assert "<td>94.4 %</td>" in shown  # text metrics of `bad`, of full precision
    assert json.loads(shown.split('type="application/json">')[1].split("</script>")[0])[0]["x"] == [2, 4]
    assert not re.findall(r"(?:src|href)=|url\((?!data:)", shown)


def test_the_page_of_several_seeds_has_means_and_ranges() -> None:
    made = whole()
    again = [{**record, "seed": 1, "score": record["score"] - 1, "drop": record["drop"] + 1} for record in records()]
    shown = page.html({**made, "records": [*records(), *again]})
    assert "<td>bad</td><td>2</td><td>89.50 (89.00&ndash;90.00)</td><td>5.50 (5.00&ndash;6.00)</td>" in shown


def test_a_page_is_made_of_a_recorded_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = Path(__file__).parents[2] / "eval" / "results" / "demo.json"
    assert page.main([str(recorded), "--out", str(tmp_path / "demo.html")]) == 0
    assert "mlgptq-minimax" in (tmp_path / "demo.html").read_text()
    (tmp_path / "x.json").write_text("{}")
    assert page.main([str(tmp_path / "x.json")]) == 2
    assert page.main([str(tmp_path / "none.json")]) == 2
    said = capsys.readouterr().err
    assert "x.json is no report of python -m eval.run: KeyError 'records'" in said
    assert "none.json: No such file or directory" in said
