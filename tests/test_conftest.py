"""A test run that is killed leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

from tests.perf.marked import wait_until_gone

ROOT = Path(__file__).parents[1]

# A test that starts a server in a session of its own, which starts an engine in another one; both ignore SIGTERM.
SERVER = """
import signal, subprocess, sys, time
sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}], start_new_session=True)"

def test_that_never_ends():
    subprocess.Popen([sys.executable, "-c", start], start_new_session=True)
    time.sleep(600)
"""


def test_a_killed_test_run_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "test_server.py").write_text(SERVER)
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "pytest", "-s", "-p", "tests.conftest", "-p", "no:cacheprovider", "-c", os.devnull]
    run = subprocess.Popen(
        [*command, "--rootdir", str(tmp_path), str(tmp_path / "test_server.py")],
        env={**os.environ, "PERF_TEST_MARK": mark, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert run.stdout is not None
    while not run.stdout.readline().endswith(b"up\n"):
        assert run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert wait_until_gone(mark) == []
