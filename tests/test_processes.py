"""Forks of one pytest run every test once, and what happens in them is told as if there were one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # to import them takes longer than the tests

# Each of the two waits for the other, which one process that runs them in turn would do for ever.
WAITS = """
import time
from pathlib import Path

def test_{mine}():
    Path("{mine}").touch()
    while not Path("{other}").exists():
        time.sleep(0.01)
"""

FAILS = """
def test_fails():
    print("printed by the test")
    assert 1 + 1 == 3
"""

DIES = """
import os

def test_passes():
    pass

def test_dies():
    os._exit(7)

def test_comes_too_late():
    pass
"""

SHARES = """
import os

def test_shares(made):
    assert made == [os.getpid()]
"""

MAKES = """
import os
import pytest

@pytest.fixture(scope="session")
def made():
    with open("made", "a") as file:
        file.write("made\\n")
    yield [os.getpid()]
    with open("made", "a") as file:
        file.write("ended\\n")
"""


def run(folder: Path, number: int, *flags: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "tests.processes", "--processes", str(number), "-c", os.devnull]
    command += ["-p", "pytest_timeout", "-p", "no:cacheprovider", "-q", "--timeout", "60", "--rootdir", ".", *flags]
    environment = {**os.environ, **NO_PLUGINS, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True).stdout


def test_files_run_side_by_side_and_failures_are_told(tmp_path: Path) -> None:
    (tmp_path / "test_1.py").write_text(WAITS.format(mine="a", other="b"))
    (tmp_path / "test_2.py").write_text(WAITS.format(mine="b", other="a"))
    (tmp_path / "test_3.py").write_text(FAILS)
    said = run(tmp_path, 2)
    assert "FAILED test_3.py::test_fails - assert (1 + 1) == 3" in said
    assert "printed by the test" in said
    assert "1 failed, 2 passed in" in said


def test_a_fork_that_dies_fails_its_test_and_those_that_nobody_runs(tmp_path: Path) -> None:
    (tmp_path / "test_1.py").write_text(DIES)
    said = run(tmp_path, 1)
    assert "FAILED test_1.py::test_dies - its process ended with exit code 7" in said
    assert "FAILED test_1.py::test_comes_too_late - not run" in said
    assert "2 failed, 1 passed in" in said


def test_a_fixture_of_the_run_is_made_once_for_all_files_of_a_fork(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(MAKES)
    for number in range(3):
        (tmp_path / f"test_{number}.py").write_text(SHARES)
    assert "3 passed in" in run(tmp_path, 1)
    assert (tmp_path / "made").read_text() == "made\nended\n"


def test_files_that_are_marked_share_a_fixture_beside_another_process(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(MAKES)
    for number in range(3):
        (tmp_path / f"test_{number}.py").write_text("import pytest\npytestmark = pytest.mark.together('x')\n" + SHARES)
    assert "3 passed in" in run(tmp_path, 2, "-W", "ignore::pytest.PytestUnknownMarkWarning")
    assert (tmp_path / "made").read_text() == "made\nended\n"


def test_a_fixture_that_fails_at_the_end_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(MAKES + "    assert False\n")
    (tmp_path / "test_1.py").write_text(SHARES)
    said = run(tmp_path, 1)
    assert "FAILED the end of the session - its process ended with exit code 1" in said
    assert "1 failed, 1 passed in" in said


def test_after_the_first_failure_no_file_is_begun(tmp_path: Path) -> None:
    (tmp_path / "test_1.py").write_text(FAILS)
    (tmp_path / "test_2.py").write_text(DIES)
    said = run(tmp_path, 1, "-x")
    assert "1 failed in" in said
    assert "stopping after 1 failures" in said
