"""`inlaid sim` as a user runs it: files, tables, and one sentence for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inlaid.report.plots import PlotsMissing
from inlaid.sim import command
from inlaid.sim.command import main, split_policies

FILES = {"real-fcfs.jsonl", "real-vtc-predict-oracle.jsonl", "real.json", "real.md", "real.png", "real.pdf"}


def write_trace(path: Path) -> None:
    lines = [[0.2 * number, f"user-{number % 2}", 20 + number % 3, 5 + number % 7] for number in range(60)]
    path.write_text("\n".join(json.dumps(line) for line in lines))


def test_a_users_trace_gives_records_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out"
    write_trace(trace)
    arguments = ["--suite", "real", "--policy", "fcfs,vtc:predict=oracle", "--trace", str(trace), "--out", str(out)]
    assert main(arguments) == 0
    assert {path.name for path in out.iterdir()} == FILES
    lines = (out / "real-fcfs.jsonl").read_text().splitlines()
    assert len(lines) == 61
    assert json.loads(lines[0])["manifest"]["seed"] == 42
    assert json.loads(lines[1])["first_token"] > 0
    assert "| vtc:predict=oracle |" in capsys.readouterr().out
    assert "machine a10g" in (out / "real.md").read_text()
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(arguments) == 0
    assert all(path.read_bytes() == first[path.name] for path in out.iterdir()), "the same twice"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "overlode"], "unknown suite 'overlode': did you mean overload? known: "),
        (["--policy", "fifo"], "unknown policy 'fifo'"),
        (["--policy", "vtc:predict=1"], "must be a string"),
        (["--machine", "tpu"], "no machine 'tpu'"),
        (["--lengths", "crystal"], "unknown lengths"),
        (["--suite", "real", "--trace", "/nowhere"], "No such file"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('[0.0, "t", 5, 5]\n[0.0, "t", "many", 5]\n')
    assert main(["--suite", "real", "--trace", str(trace)]) == 2
    assert "line 2" in capsys.readouterr().err


def test_options_of_policies_survive_the_commas() -> None:
    assert split_policies("vtc,inlaid:beta=5,ageing=2,fcfs") == ["vtc", "inlaid:beta=5,ageing=2", "fcfs"]
    assert split_policies("rpm:limit=5,window=10;vtc") == ["rpm:limit=5,window=10", "vtc"]


def test_without_matplotlib_the_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(size: tuple[float, float]) -> None:
        raise PlotsMissing("figures need matplotlib")

    monkeypatch.setattr(command, "new_figure", missing)
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out"
    write_trace(trace)
    assert main(["--suite", "real", "--policy", "fcfs", "--trace", str(trace), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"real-fcfs.jsonl", "real.json", "real.md"}
    assert capsys.readouterr().err.count("no figures are drawn: figures need matplotlib") == 1


def test_recorded_commands_keep_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "cliff,overlode"]) == 2
    assert "unknown suite 'overlode'" in capsys.readouterr().err
