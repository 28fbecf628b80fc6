"""Nothing outlives its owner: however the owner goes, and wherever a descendant hides."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.perf.marked import marked_processes, wait_until_gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descendants are followed through Linux's /proc")

# Starts a grandchild in a session of its own (out of reach of a signal to the group), which ignores SIGTERM.
FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import signal, time\\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\ntime.sleep(600)"], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a marked command under a warden; pipes are closed at the end."""
    wardens: list[subprocess.Popen[bytes]] = []

    def starter(mark: str, *command: str) -> subprocess.Popen[bytes]:
        wardens.append(_start(mark, *command))
        return wardens[-1]

    yield starter
    for warden in wardens:
        with warden:
            pass


Start = Callable[..., subprocess.Popen[bytes]]


def _start(mark: str, *command: str, grace: str = "0.3") -> subprocess.Popen[bytes]:
    warden = [sys.executable, "-m", "perf.warden", "--grace", grace, "--", *command]
    env = {**os.environ, "PERF_TEST_MARK": mark}
    return subprocess.Popen(warden, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)


def started_family(start: Start) -> tuple[str, subprocess.Popen[bytes]]:
    mark = uuid.uuid4().hex
    warden = start(mark, sys.executable, "-c", FAMILY)
    assert warden.stdout is not None
    assert warden.stdout.readline() == b"up\n"
    assert len(marked_processes(mark)) == 3
    return mark, warden


def test_closing_the_pipe_ends_the_whole_family(start: Start) -> None:
    mark, warden = started_family(start)
    assert warden.stdin is not None
    warden.stdin.close()
    assert warden.wait(20) == 143
    assert marked_processes(mark) == []


def test_sigterm_to_the_warden_does_too(start: Start) -> None:
    mark, warden = started_family(start)
    warden.terminate()
    assert warden.wait(20) == 143
    assert marked_processes(mark) == []


def test_a_killed_owner_is_noticed(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    owner_code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-m', 'perf.warden', '--grace', '0.3', '--',"
        f" sys.executable, '-c', {FAMILY!r}], stdin=subprocess.PIPE)\ntime.sleep(600)"
    )
    env = {**os.environ, "PERF_TEST_MARK": mark}
    owner = subprocess.Popen([sys.executable, "-c", owner_code], env=env, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"up\n"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert wait_until_gone(mark) == []


def test_exit_codes_and_output_are_the_commands(start: Start) -> None:
    warden = start(uuid.uuid4().hex, sys.executable, "-c", "print('hello'); raise SystemExit(7)")
    assert warden.stdout is not None
    assert warden.stdout.read() == b"hello\n"
    assert warden.wait(20) == 7


def test_what_the_command_leaves_behind_goes_with_it(start: Start) -> None:
    mark = uuid.uuid4().hex
    leave = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    assert start(mark, sys.executable, "-c", leave).wait(20) == 0
    assert marked_processes(mark) == []


def test_a_command_that_is_not_there(start: Start) -> None:
    assert start(uuid.uuid4().hex, "/no/such/command").wait(20) == 127
