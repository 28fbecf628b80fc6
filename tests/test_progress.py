"""Progress bars: redrawn on a terminal with a total from the start, and a line per stage where the output is piped."""

from __future__ import annotations

import io
import logging

import pytest

from inlaid.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().rpartition(", ")[0] for record in caplog.records if record.name == "inlaid.progress"]


def test_a_piped_bar_is_one_line_at_its_end(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    assert list(Bar(range(1200), desc="reading", unit="run")) == list(range(1200))
    assert lines(caplog) == ["reading: 1,200 run"]
    with Bar(total=9, desc="asking") as bar:
        bar.update(4)
    assert lines(caplog)[1:] == ["asking: 4 of 9"]
    with Bar(total=9, desc="hidden", disable=True) as bar:
        bar.update(9)
    assert len(lines(caplog)) == 2
    assert capsys.readouterr().err == ""


def test_a_long_piped_job_tells_each_share_with_the_time_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Bar(total=50, desc="quantizing", lines=5) as bar:
        for _ in range(50):
            bar.update()
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(",")[0] for line in said] == [
        *(f"quantizing: {done} of 50" for done in (10, 20, 30, 40)),
        "quantizing: 50",
    ]
    assert all("s left" in line for line in said[:-1])


def test_a_bar_that_ends_at_once_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert list(Bar(range(3), desc="quick", delay=60)) == [0, 1, 2]
    assert lines(caplog) == []


def test_on_a_terminal_the_bar_shows_its_total_and_averages_over_the_whole_run() -> None:
    screen = Terminal()
    with Bar(total=8, desc="solving", file=screen) as bar:
        assert bar.smoothing == 0
        bar.update(8)
    assert "solving:   0%|" in screen.getvalue()
    assert "8/8" in screen.getvalue()


def test_where_no_log_is_configured_lines_go_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("inlaid.progress.log", logging.Logger("alone"))
    assert list(Bar(range(2), desc="reading")) == [0, 1]
    assert capsys.readouterr().err.startswith("reading: 2, ")
