"""Azure's trace of functions: its format, what is refused, and the statistics of the drawn one."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from inlaid.workload import functions
from perf import functions_like


def test_a_written_trace_is_read_again(tmp_path: Path) -> None:
    made = functions.synthetic(50, seed=3, minutes=functions.MINUTES)
    functions.write(tmp_path / "day.csv", made)
    assert np.array_equal(functions.read(tmp_path / "day.csv").counts, made.counts)
    (tmp_path / "day.csv.gz").write_bytes(gzip.compress((tmp_path / "day.csv").read_bytes()))
    assert np.array_equal(functions.read(tmp_path / "day.csv.gz", minutes=7).counts, made.counts[:, :7])


def test_calls_lie_within_their_minute_and_busy_minutes_are_left_out() -> None:
    counts = np.array([[0, 3], [11, 2], [10, 0]], dtype=np.int32)
    found = functions.Functions(counts)
    first, second = found.calls(0, seed=1), found.calls(1, seed=1)
    assert [function for _, function in first] == [2] * 10
    assert sorted(function for _, function in second) == [0, 0, 0, 1, 1]
    assert all(0 <= at < 60 for at, _ in first + second)
    assert first == sorted(first)
    assert first == found.calls(0, seed=1) != found.calls(0, seed=2)


def test_the_drawn_functions_have_the_published_statistics() -> None:
    counts = functions.synthetic(40_000, seed=1, minutes=60).counts
    rates = counts.mean(axis=1)
    assert 0.41 < (rates <= 1 / 60).mean() < 0.53, "published: 45% at most once an hour"
    assert 0.77 < (rates <= 1).mean() < 0.85, "published: 81% at most once a minute"
    busiest = np.sort(counts.sum(axis=1))[::-1]
    assert busiest[: int(0.186 * len(busiest))].sum() > 0.99 * busiest.sum(), "published: 99.6% of calls"
    assert 240 < len(functions.synthetic(40_000).calls(0, 0)) / 60 < 440, "the paper: about 340 a second"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a,b\n", "the first line must be HashOwner"),
        ("HashOwner,HashApp,HashFunction,Trigger,1,2\no,a,f,http,1\n", "line 2: it has 5 columns"),
        ("HashOwner,HashApp,HashFunction,Trigger,1,2\no,a,f,http,1,x\n", "line 2: invalid literal"),
        ("HashOwner,HashApp,HashFunction,Trigger,1,2\no,a,f,http,1,-1\n", "line 2: a count is negative"),
        ("HashOwner,HashApp,HashFunction,Trigger,1\no,a,f,http,1\n", "with 2 minutes or more"),
    ],
)
def test_what_is_no_such_trace_is_refused(text: str, why: str, tmp_path: Path) -> None:
    (path := tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=why):
        functions.read(path, 2)


def test_the_command_writes_such_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "day.csv"
    assert functions_like.main(["--out", str(out), "--functions", "30", "--minutes", "40"]) == 0
    assert "30 functions" in capsys.readouterr().out
    assert functions.read(out, 40).counts.shape == (30, 40)
