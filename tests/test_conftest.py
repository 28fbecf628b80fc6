"""A test run that is killed leaves no process behind; a test that leaves a subprocess behind is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.perf.marked import wait_until_gone
from tests.test_processes import NO_PLUGINS

ROOT = Path(__file__).parents[1]

# A test that starts a server in a session of its own, which starts an engine in another one; both ignore SIGTERM.
SERVER = """
import signal, subprocess, sys, time
sleep = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(2, b'up\\n'); time.sleep(600)"
start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}], start_new_session=True)"

def test_that_never_ends():
    subprocess.Popen([sys.executable, "-c", start], start_new_session=True)
    time.sleep(600)
"""

# A loop that ends before its subprocess, which something still holds. The test behind it would fail by the warning.
OPEN = """
import asyncio, sys
held = []

def test_leaves_one():
    loop = asyncio.new_event_loop()
    start = asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
    held.append(loop.run_until_complete(start))
    loop.close()

def test_has_done_nothing():
    held.pop()

def test_waits():
    async def run():
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "pass")
        await process.wait()
    asyncio.run(run())
"""

PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-p",
    "tests.leftovers",
    "-p",
    "no:cacheprovider",
    "-c",
    os.devnull,
)


@pytest.mark.parametrize("forks", [(), ("-p", "tests.processes", "--processes", "1")], ids=["alone", "forks"])
def test_a_killed_test_run_leaves_no_process(tmp_path: Path, forks: tuple[str, ...]) -> None:
    (tmp_path / "test_server.py").write_text(SERVER)
    mark = uuid.uuid4().hex
    run = subprocess.Popen(
        [*PYTEST, *forks, "-s", "--rootdir", str(tmp_path), str(tmp_path / "test_server.py")],
        env={**os.environ, **NO_PLUGINS, "PERF_TEST_MARK": mark, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert run.stderr is not None
    while not run.stderr.readline().endswith(b"up\n"):
        assert run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stderr.close()
    assert wait_until_gone(mark) == []


def test_a_subprocess_that_outlives_its_loop_fails_the_test_that_left_it(tmp_path: Path) -> None:
    (tmp_path / "test_open.py").write_text(OPEN)
    command = [*PYTEST, "-q", "-rA", "--rootdir", str(tmp_path), str(tmp_path / "test_open.py")]
    environment = {**os.environ, **NO_PLUGINS, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "ERROR test_open.py::test_leaves_one - Failed: the event loop was closed" in said
    assert "<_UnixSubprocessTransport pid=" in said
    assert "3 passed, 1 error in" in said


def test_both_rules_hold_in_this_run(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.pluginmanager.has_plugin("transports")
    processes = {os.getpid(), os.getppid()}  # with --processes this one is a fork of the one that has the warden
    assert any(f"INLAID_TEST_RUN_{each}" in os.environ for each in processes)
