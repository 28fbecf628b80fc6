"""A forked process is like one that starts anew: what it says, its exit code, its environment and its end."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import fork_server

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _forks() -> None:
    if fork_server.of_this_process(os.getpid()) is None:
        pytest.skip("no server of forks: this process has threads, or a GPU")


@pytest.mark.parametrize("arguments", [["version"], ["serve", "--port", "99999"], ["nonsense"]])
def test_a_module_says_and_returns_what_it_does_anew(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "inlaid", *arguments]
    anew = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    fork = fork_server.popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert isinstance(fork, fork_server.Fork)
    assert fork.stdout is not None
    assert fork.stdout.read() == anew.stdout
    assert fork.wait(60) == anew.returncode
    fork.stdout.close()


def test_a_fork_can_be_waited_for_and_killed() -> None:
    fork = fork_server.call(time.sleep, 600)
    assert fork is not None
    assert fork.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        fork.wait(0.01)
    fork.kill()
    assert fork.wait(60) == -signal.SIGKILL
    fork.kill()  # it has ended: nothing is killed


def write_down(file: Path) -> None:
    """Write what this process has of the one that it was forked from."""
    descriptors = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    loggers = [str(handler) for handler in logging.getLogger().handlers]
    found = {"variable": os.environ.get("FORKED"), "folder": os.getcwd(), "loggers": loggers}
    file.write_text(json.dumps({**found, "descriptors": descriptors[:-1]}))  # the last is of the list


def test_a_fork_has_nothing_but_its_environment_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORKED", "yes")
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "open").open("w"):
        fork = fork_server.call(write_down, tmp_path / "found")
        assert fork is not None
        assert fork.wait(60) == 0
    found = json.loads((tmp_path / "found").read_text())
    assert found == {"variable": "yes", "folder": str(tmp_path), "loggers": [], "descriptors": [0, 1, 2]}


def leave_one(file: Path) -> None:
    """Be a process of tests that is killed while a fork of its own runs."""
    fork = fork_server.call(time.sleep, 600)
    assert fork is not None
    file.write_text(str(fork.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def test_forks_end_with_the_process_of_tests(tmp_path: Path) -> None:
    fork = fork_server.call(leave_one, tmp_path / "left")
    assert fork is not None
    assert fork.wait(60) == -signal.SIGKILL
    left = Path("/proc") / (tmp_path / "left").read_text()
    while left.exists():  # the test's own timeout ends what never comes true
        time.sleep(0.01)
