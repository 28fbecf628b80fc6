"""The runner: a grid killed at random moments ends as an undisturbed one, and mistakes stop it before it starts."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from perf.archive import Archive
from perf.attempt import verdict
from perf.process import ROOT
from perf.runner import main
from tests.perf.forked import Forked
from tests.perf.marked import marked_processes, wait_until_gone

GRID = """
[global]
name = "grid"
log_home = "HOME"
retries = 0
[selection]
models = ["tiny"]
datasets = ["short"]
[server]
kind = "fake"
policy = ["fcfs", "vtc"]
args = { ttft-ms = 5, itl-ms = 2 }
[router]
port = 0
[axes]
adapters = [1, 3]
rate = [60, 120, 240]
[models.tiny]
model_path = "tiny"
adapters = ["a=/tmp", "b=/tmp", "c=/tmp"]
[datasets.short]
num_requests = 12
output = { value = 6 }
"""


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let server and client of a runner in this process be forks; with a warden they run in the grid that is killed."""
    monkeypatch.setattr("perf.attempt.Supervised", Forked)


@pytest.fixture(autouse=True)
def _reports_only_where_they_matter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds a test; the test of plots makes its own, and so do the demos."""
    if "plot" not in request.node.name:
        monkeypatch.setattr("perf.runner.write_report", lambda archive: None)


def saved(folder: Path, text: str = GRID) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "grid.toml"
    path.write_text(text.replace("HOME", str(folder / "archives")))
    return path


UNDRAWN = "import sys; from perf import runner; runner.write_report = lambda archive: None; sys.exit(runner.main())"


def start(mark: str, *arguments: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PERF_TEST_MARK": mark}
    command = [sys.executable, "-c", UNDRAWN, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def archive_of(folder: Path) -> Archive:
    (home,) = [path for path in (folder / "archives").iterdir() if not path.name.startswith(".")]
    return Archive(home)


def wait_for_archive(folder: Path) -> Archive:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (folder / "archives").is_dir() and list((folder / "archives").glob("*/points.json")):
            return archive_of(folder)
        time.sleep(0.05)
    raise AssertionError("no archive appeared")


def results(archive: Archive) -> dict[str, Any]:
    """Return what must be the same in every run of the grid: all but measured times."""
    found = {}
    for point, attempt in archive.passed().items():
        summary = json.loads((archive.attempt_directory(point, attempt) / "summary.json").read_text())
        keys = ("completed", "failed", "total_input_tokens", "total_output_tokens", "num_adapters", "statuses")
        per_adapter = {name: group["completed"] for name, group in summary["per_adapter"].items()}
        found[point] = {key: summary[key] for key in keys} | {"per_adapter": per_adapter}
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_grid_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path: Path, long: bool) -> None:
    mark = uuid.uuid4().hex
    grid = GRID if long else GRID.replace('["fcfs", "vtc"]', '"vtc"').replace("[60, 120, 240]", "[60, 240]")
    runner = start(mark, "--templates", str(saved(tmp_path / "killed", grid)))
    archive = wait_for_archive(tmp_path / "killed")
    for _ in range(3 if long else 2):
        pause = random.uniform(0.2, 3.0)
        print(f"kill after {pause:.3f} s with {len(archive.passed())} points passed")
        time.sleep(pause)
        assert runner.poll() is None, "the grid was over before it could be killed"
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        runner = start(mark, "--checkpoint", str(archive.home))
    assert runner.wait(120) == 0
    assert wait_until_gone(mark) == []
    assert main(["--templates", str(saved(tmp_path / "calm", grid))]) == 0
    calm_results = results(archive_of(tmp_path / "calm"))
    assert len(calm_results) == (12 if long else 4)
    assert results(archive) == calm_results
    assert_nothing_ran_twice(archive)
    assert (archive.home / "results.csv").read_text().count("\n") == 1 + len(calm_results)


def assert_nothing_ran_twice(archive: Archive) -> None:
    """One pass a point, nothing after it, and no whole result thrown away before it."""
    events = archive.events()
    for point in archive.points:
        own = [event for event in events if event.point == point]
        assert [event.event for event in own].count("passed") == 1
        assert own[-1].event == "passed"
        assert all(event.event in ("started", "interrupted") for event in own[:-1])
        for attempt in range(1, own[-1].attempt):
            summary = archive.attempt_directory(point, attempt) / "summary.json"
            assert verdict(summary, archive.instance(point).max_failed_share), "a whole result was thrown away"


@pytest.mark.usefixtures("forked")
def test_a_whole_result_without_its_line_is_adopted_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    """The two worst moments for a kill: before the checkpoint's line, and in the middle of it."""
    small = GRID.replace("[1, 3]", "3").replace("[60, 120, 240]", "240").replace('["fcfs", "vtc"]', '"vtc"')
    template = saved(tmp_path, small)
    assert main(["--templates", str(template)]) == 0
    archive = archive_of(tmp_path)
    whole = archive.checkpoint.read_bytes().splitlines(keepends=True)
    for left in (b"".join(whole[:1]), b"".join(whole[:1]) + whole[1][:17]):
        archive.checkpoint.write_bytes(left)
        assert main(["--checkpoint", str(archive.home)]) == 0
        assert [event.event for event in archive.events()] == ["started", "resumed", "passed"]
    assert not (archive.directory(archive.points[0]) / "attempt-2").exists()


def test_the_first_points_alone_are_a_quick_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = saved(tmp_path)
    assert main(["--templates", str(template), "--dry-run", "--first", "2"]) == 0
    assert archive_of(tmp_path).points == capsys.readouterr().out.splitlines()[1:]
    assert len(archive_of(tmp_path).points) == 2
    for wrong in (["--templates", str(template), "--first", "0"], ["--checkpoint", str(tmp_path), "--first", "1"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        assert "--first takes a number of 1 or more, and --templates" in capsys.readouterr().err


@pytest.mark.usefixtures("forked")
def test_failures_are_recorded_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every third request fails: the point fails twice, is recorded, and is tried again on resume and by force."""
    small = GRID.replace("[1, 3]", "3").replace("[60, 120, 240]", "240").replace('["fcfs", "vtc"]', '"vtc"')
    text = small.replace("itl-ms = 2", "itl-ms = 2, fail-every = 3").replace("retries = 0", "retries = 1")
    assert main(["--templates", str(saved(tmp_path, text))]) == 1
    archive = archive_of(tmp_path)
    assert [event.event for event in archive.events()] == ["started", "failed"] * 2
    assert "4 of 12 requests failed" in archive.events()[-1].reason
    assert "0 passed, 1 failed" in capsys.readouterr().out
    assert main(["--checkpoint", str(archive.home)]) == 1
    assert len(archive.events()) == 9
    assert main(["--checkpoint", str(archive.home), "--force"]) == 1
    assert len(archive.events()) == 5


@pytest.mark.usefixtures("forked")
def test_a_server_that_dies_fails_the_point_at_once_with_its_last_words(tmp_path: Path) -> None:
    text = GRID.replace("itl-ms = 2", "no-such-flag = 2").replace("[60, 120, 240]", "240").replace("[1, 3]", "1")
    assert main(["--templates", str(saved(tmp_path, text.replace('["fcfs", "vtc"]', '"vtc"')))]) == 1
    reason = archive_of(tmp_path).events()[-1].reason
    assert "exited with 2 before it was ready" in reason
    assert "unrecognized arguments: --no-such-flag" in reason


def test_interrupting_the_runner_ends_its_processes(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    slow = GRID.replace("[60, 120, 240]", "0.01")
    runner = start(mark, "--templates", str(saved(tmp_path, slow)))
    archive = wait_for_archive(tmp_path)
    end = time.monotonic() + 60
    while len(marked_processes(mark)) < 5 and time.monotonic() < end:
        time.sleep(0.05)
    for patience in (20, 20, 60):  # Python drops an interrupt that comes while a finalizer runs
        runner.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            runner.wait(patience)
        if runner.returncode is not None:
            break
    assert runner.returncode == 130
    assert marked_processes(mark) == []
    assert archive.events()[-1].event == "interrupted"


def test_dry_run_starts_nothing_and_writes_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a dry run started an attempt")

    monkeypatch.setattr("perf.runner.run_attempt", forbidden)
    assert main(["--templates", str(saved(tmp_path)), "--dry-run"]) == 0
    archive = archive_of(tmp_path)
    assert capsys.readouterr().out.count("tiny-short/") == 12
    assert len(archive.points) == 12
    for point in archive.points:
        names = {path.name for path in archive.directory(point).iterdir()}
        assert names == {"instance.json", "workload.json", "launch_server.sh", "launch_client.sh"}
        assert archive.instance(point).point == point
    home = {path.name for path in archive.home.iterdir()}
    assert home >= {"points.json", "git-revision.txt", "git-diff.patch", "git-untracked.txt", "templates"}
    assert not archive.checkpoint.exists()


def test_the_written_scripts_run_by_hand(tmp_path: Path) -> None:
    assert main(["--templates", str(saved(tmp_path)), "--dry-run"]) == 0
    archive = archive_of(tmp_path)
    directory = archive.directory(archive.points[0])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "PORT": str(port)}
    server = subprocess.Popen(["bash", str(directory / "launch_server.sh")], env=env)
    try:
        script = (
            (directory / "launch_client.sh").read_text().replace("--no-progress", "--no-progress --ready-timeout 30")
        )
        (directory / "launch_client.sh").write_text(script)
        assert subprocess.run(["bash", str(directory / "launch_client.sh")], env=env, check=False).returncode == 0
    finally:
        server.terminate()
        server.wait()
    assert json.loads((directory / "by_hand.json").read_text())["completed"] == 12


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("retries = 0", "retires = 0", "did you mean retries?"),
        ("[datasets.short]", '[datasets.short]\ndataset_path = "/no/such.csv"', "dataset /no/such.csv does not exist"),
        ('datasets = ["short"]', 'datasets = ["short"]\nfeatures = ["fast"]', "unknown feature 'fast'"),
        ("port = 0", "port = BUSY", "is in use: stop what listens there"),
        ("port = 0", "port = 0\nmax_prefill_num = 13", "router.max_prefill_num (one server is started a point"),
        ('model_path = "tiny"', 'model_path = "./no/such/model"', "model ./no/such/model does not exist"),
        ('"a=/tmp"', '"a=/no/such"', "adapter a: /no/such does not exist"),
        ('model_path = "tiny"', 'model_path = "DEMO"\nnum_hidden_layers = 99', "the template says 99: another model?"),
        (
            'model_path = "tiny"',
            'model_path = "models/cache/x-4bit"',
            "does not exist: bash models/download.sh model x, ",
        ),
        (
            'model_path = "tiny"\nadapters = ["a=/tmp", "b=/tmp", "c=/tmp"]',
            'model_path = "DEMO"\nrandom_adapters = { count = 3, ranks = [1000000000] }',
            "random adapters need 64512.0 GB in .inlaid/perf/adapters",
        ),
        ('kind = "fake"', 'kind = "slora"', "S-LoRA is not installed here"),
        ('kind = "fake"', 'kind = "inlaid"', "inlaid serve has no argument --ttft-ms"),
        ('kind = "fake"', 'kind = "sglang"', "known: inlaid, vllm, slora, fake"),
        ("port = 0", "port = 99999", "`int` <= 65535 - at `router.port`"),
        ("[global]", '[client]\nwarmup = "lots"\n[global]', "argument --warmup: invalid int value: 'lots'"),
        ("[global]", '[extra-envs]\n"A=B" = 1\n[global]', "at `key` in `extra-envs`"),
        ("rate = [60, 120, 240]", "rate = inf", "axes.rate must be a finite number"),
    ],
)
def test_a_bad_template_is_one_line_and_code_2_before_anything_starts(
    tmp_path: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        new = new.replace("BUSY", str(busy.getsockname()[1])).replace("DEMO", str(ROOT / "models" / "demo" / "base"))
        assert old in GRID
        assert main(["--templates", str(saved(tmp_path, GRID.replace(old, new, 1)))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "archives").exists()


def test_two_runners_do_not_share_an_archive(tmp_path: Path) -> None:
    assert main(["--templates", str(saved(tmp_path)), "--dry-run"]) == 0
    archive, other = archive_of(tmp_path), archive_of(tmp_path)
    with archive.held(), pytest.raises(ValueError, match="in use by another runner"), other.held(timeout_s=0.2):
        pass
    with other.held(timeout_s=0.2):
        pass


def test_the_config_wins_over_the_environment_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOG_LEVEL", "from the shell")
    small = GRID.replace("[1, 3]", "3").replace("[60, 120, 240]", "240").replace('["fcfs", "vtc"]', '"vtc"')
    template = saved(tmp_path, small + '[extra-envs]\nLOG_LEVEL = "from the config"\n')
    assert main(["--templates", str(template), "--color"]) == 0
    assert "\033[32mpassed\033[0m" in capsys.readouterr().out
    archive = archive_of(tmp_path)
    record = json.loads((archive.attempt_directory(archive.points[0], 1) / "environment.json").read_text())
    assert record == {"set": {"LOG_LEVEL": "from the config"}, "replaced": {"LOG_LEVEL": "from the shell"}}


@pytest.mark.usefixtures("forked")
def test_a_plot_that_fails_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matplotlib that cannot be imported as it should: the report says so, the run passes."""
    broken = tmp_path / "broken" / "matplotlib"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('broken on purpose')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    small = GRID.replace("[1, 3]", "3").replace("[60, 120, 240]", "240").replace('["fcfs", "vtc"]', '"vtc"')
    assert main(["--templates", str(saved(tmp_path, small))]) == 0
    archive = archive_of(tmp_path)
    assert not (archive.home / "report.html").exists()
    assert len(json.loads((archive.home / "results.json").read_text())) == 1


@pytest.mark.parametrize(
    "arguments", [[], ["--templates", "a.toml", "--checkpoint", "b"], ["--templates", "a.toml", "--force"]]
)
def test_impossible_flags_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_a_folder_that_is_no_archive_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path)]) == 2
    assert "is not an archive of experiments" in capsys.readouterr().err
