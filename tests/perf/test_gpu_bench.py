"""The command that runs the stages: calls and lanes, limits on time, archives, headlines, and recorded figures."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from perf.gpu import bench, expected, lanes
from perf.gpu.headlines import headline


def test_calls_are_made_of_known_stages_and_no_two_lanes_do_the_same() -> None:
    for call in bench.CALLS.values():
        stages = [stage for lane in call for together in lane for stage in together.split("+")]
        assert set(stages) <= set(bench.LIMITS)
        assert len(set(stages)) == len(stages)


def test_lanes_run_side_by_side_each_with_a_gpu_cores_and_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stage waits for its neighbour; and writes what it was given."""
    program = (
        "import json, os, sys, time; from pathlib import Path; out, stage, other = sys.argv[1:];"
        "names = ('CUDA_VISIBLE_DEVICES', 'INLAID_BENCH_ROOT', 'TRITON_CACHE_DIR', 'HUMMING_CACHE_DIR', "
        "'XDG_CACHE_HOME');"
        "Path(out, stage + '.started').touch(); print('here');"
        "found = {'cores': len(os.sched_getaffinity(0)), **{name: os.environ[name] for name in names}};"
        "end = time.monotonic() + 60\n"
        "while other and not Path(out, other + '.started').exists() and time.monotonic() < end: time.sleep(0.05)\n"
        "from perf.gpu import bench; bench.write(Path(out, stage + '.json'), {'result': {'share': 0.5, **found}})"
    )
    start = subprocess.Popen
    others = {"demo": "soak", "soak": "demo", "checks": ""}

    def popen(command: list[str], **more: Any) -> Any:
        out, stage = command[command.index("--out") + 1], command[command.index("--stages") + 1]
        return start([sys.executable, "-c", program, out, stage, others[stage]], **more)

    monkeypatch.setattr(lanes.subprocess, "Popen", popen)
    monkeypatch.setattr(lanes, "POLL", 0.1)
    home = tmp_path / "home"
    monkeypatch.setattr(
        sys, "argv", ["bench", "--out", str(home), "--lane", "demo,checks", "--lane", "soak", "--archive"]
    )
    assert bench.main() == 0
    assert [file.name for file in home.iterdir()] == ["results.tar.gz"]
    with tarfile.open(home / "results.tar.gz") as whole:
        read = {name: (whole.extractfile(name) or io.BytesIO()).read() for name in whole.getnames()}
    assert read["soak.log"] == b"here\n"
    found = {name.removesuffix(".json"): json.loads(read[name])["result"] for name in read if name.endswith("json")}
    assert set(read) == {f"{stage}.{kind}" for stage in ("demo", "checks", "soak") for kind in ("json", "log")}
    assert [found[name]["CUDA_VISIBLE_DEVICES"] for name in ("demo", "checks", "soak")] == ["0", "0", "1"]
    assert found["demo"]["INLAID_BENCH_ROOT"] == found["checks"]["INLAID_BENCH_ROOT"]
    for name in ("TRITON_CACHE_DIR", "HUMMING_CACHE_DIR", "XDG_CACHE_HOME"):
        for stage in ("demo", "soak"):
            assert found[stage][name].startswith(found[stage]["INLAID_BENCH_ROOT"] + "/")
        assert found["demo"][name] != found["soak"][name]
    cores = len(os.sched_getaffinity(0))
    assert found["demo"]["cores"] == max(1, cores // 2)
    said = capsys.readouterr().out
    assert said.count("soak: done after") == 2  # at once, and at the end
    assert "share 0.5" in said


def test_a_stage_that_breaks_keeps_what_it_found_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(name: str, out: Path, keep: Any) -> dict[str, Any]:
        keep({"share": 0.5})
        raise RuntimeError("no room")

    monkeypatch.setattr(bench, "run_stage", stage)
    assert bench.in_process("soak", tmp_path) == 1
    written = json.loads((tmp_path / "soak.json").read_text())
    assert written["result"] == {"share": 0.5, "error": "RuntimeError: no room"}
    assert written["stage"] == "soak"


def test_a_stage_past_its_time_ends_with_all_it_started_and_keeps_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = tmp_path / "child"
    program = (
        "import subprocess, sys, time, pathlib; from perf.gpu import bench;"
        f"bench.write(pathlib.Path({str(tmp_path)!r}) / 'soak.json', {{'result': {{'share': 0.5}}}});"
        "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']);"
        f"pathlib.Path({str(child)!r}).write_text(str(grandchild.pid)); time.sleep(300)"
    )
    start = subprocess.Popen
    monkeypatch.setattr(
        lanes.subprocess, "Popen", lambda command, **more: start([sys.executable, "-c", program], **more)
    )
    line = lanes.run_limited("soak", 6, tmp_path, time.monotonic() + 100)
    assert "ran past 6 s" in line
    assert line.endswith("share 0.5")
    assert ended(int(child.read_text()))
    assert "no time was left" in lanes.run_limited("soak", 6, tmp_path, time.monotonic() + 1)
    assert line in capsys.readouterr().out


def ended(pid: int) -> bool:
    """Gone, or dead and not yet reaped."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_headlines_say_what_matters() -> None:
    row = {"adapters": 32, "concurrency": 64, "output_tokens_per_second": 6605.4, "ms_per_token": 8.7, "ttft_ms": 160}
    assert headline({"ready_s": 12.34, "rows": [row, {**row, "names": "m", "concurrency": 1}]}) == (
        "ready in 12.3 s; 32@64 6605 tok/s, first 160 ms; m32@1 8.70 ms"
    )
    choices = [
        {"variant": "as shipped", "us": 7000.0, "same_bits": "20 of 20"},
        {"variant": "b", "us": 6900.4, "same_bits": ""},
        {"variant": "c", "failed": "x"},
    ]  # fmt: skip
    step_found = {
        "steps": [{"rows": 64, "adapters": 32, "choices": choices}, {"rows": 1, "adapters": 1, "choices": []}]
    }
    assert headline(step_found) == "32@64 7000 us, b 6900 (20 of 20 equal)"
    again = {"deterministic": True, "32 adapters": {"all_equal": 99, "repetitions": 99, "fewest_equal": 64}}
    assert headline(again) == "32 adapters: 99 of 99 equal"
    assert headline({"failed": ["humming"], "share": 0.99}) == "share 0.99; failed ['humming']"
    assert headline({"starts": [{"caches": "cold", "error": "x"}, {"caches": "warm", "ready_s": 9.0}]}) == (
        "cold nan s; warm 9.0 s"
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that write what they were given and when they ran."""
    program = (
        "import json, sys, time; from pathlib import Path; out, stage = sys.argv[1:]; begin = time.monotonic();"
        "time.sleep(0.5); figures = {'serve-7b': {'rows': [{'adapters': 0, 'concurrency': 1, 'ms_per_token': 1.0}]}};"
        "from perf.gpu import bench;"
        "found = figures.get(stage, {}) | {'ran': [begin, time.monotonic()]};"
        "bench.write(Path(out, stage + '.json'), {'result': found})"
    )
    start = subprocess.Popen

    def popen(command: list[str], **more: Any) -> Any:
        out, stage = command[command.index("--out") + 1], command[command.index("--stages") + 1]
        return start([sys.executable, "-c", program, out, stage], **more)

    monkeypatch.setattr(lanes.subprocess, "Popen", popen)
    monkeypatch.setattr(lanes, "POLL", 0.1)


def test_the_call_house_measures_rows_alone_and_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    """Every stage runs, none on the GPU of one that is timed; the table and the exit code say what is missing."""
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path), "--call", "house", "--seconds", "120"])
    assert bench.main() == 1
    lanes_stages = [[stage for together in lane for stage in together.split("+")] for lane in bench.CALLS["house"]]
    for stages in lanes_stages:
        ran = {stage: json.loads((tmp_path / f"{stage}.json").read_text())["result"]["ran"] for stage in stages}
        timed = [stage for stage in stages if stage.startswith(("serve", "ranks", "exllama"))]
        for stage in timed:
            begin, end = ran[stage]
            assert all(other_end <= begin or other_begin >= end for other_begin, other_end in _others(ran, stage))
        assert stages[: len(timed)] == timed
    together = [
        json.loads((tmp_path / f"{stage}.json").read_text())["result"]["ran"]
        for stage in ("determinism-7b", "checks-short")
    ]
    assert max(begin for begin, _ in together) < min(end for _, end in together)
    table = (tmp_path / "house.md").read_text()
    assert re.search(r"7B none@1, ms a token +1\.00 +2\.35 +2\.350", table)
    assert f"1 of {len(expected.read())} figures as recorded or near it" in table
    assert "7B 32@1, ms a token (not measured)" in capsys.readouterr().out


def _others(ran: dict[str, list[float]], stage: str) -> list[list[float]]:
    return [times for name, times in ran.items() if name != stage]


def test_recorded_figures_belong_to_stages_of_the_call_house() -> None:
    stages = {stage for lane in bench.CALLS["house"] for together in lane for stage in together.split("+")}
    figures = expected.read()
    assert {figure.stage for figure in figures} <= stages
    assert len({figure.title for figure in figures}) == len(figures)
    assert all(figure.expected > 0 for figure in figures)


def test_a_figure_is_compared_in_the_direction_in_which_it_counts(tmp_path: Path) -> None:
    result = {"rows": [{"adapters": 0, "names": "m", "rate": 97.0}, {"adapters": 1, "ms_per_token": 2.0}], "equal": 3}
    bench.write(tmp_path / "one.json", {"result": result})
    figures = [
        expected.Figure("one", "rate", ("rate",), 100.0, {"names": "m"}),
        expected.Figure("one", "latency", ("ms_per_token",), 1.99, {"adapters": 1}),
        expected.Figure("one", "equal", ("equal",), 3, least=1.0),
    ]
    assert [figure.found_in(tmp_path) for figure in figures] == [97.0, 2.0, 3.0]
    table, well = expected.compare(tmp_path, figures)
    assert not well
    assert table.splitlines()[-1] == "below or missing: rate (0.970)"
    assert expected.compare(tmp_path, figures[1:])[1]
    assert expected.Figure("two", "none", ("equal",), 3).found_in(tmp_path) is None


def test_the_unit_tests_of_a_gpu_are_counted_as_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_some.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    monkeypatch.setattr(bench, "TEST_PATHS", (str(tmp_path),))
    monkeypatch.setattr(bench, "WORKERS", "1")
    kept: list[dict[str, Any]] = []
    found = bench.kernel_tests(kept.append)
    assert found["passed"] == 1
    assert [name.split("::")[-1] for name in found["failed"]] == ["test_b"]
    assert kept[0]["passed"] == 0


def test_tests_that_cannot_start_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conftest.py").write_text("raise RuntimeError('no tests')\n")
    monkeypatch.setattr(bench, "TEST_PATHS", (str(tmp_path),))
    monkeypatch.setattr(bench, "WORKERS", "0")
    assert bench.kernel_tests(lambda part: None)["failed"]
