"""install.sh as a new user meets it: what it refuses, what it passes on, and that a named Python is used as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(folder / "install.sh"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )


def test_an_unknown_command_is_refused_with_the_known_ones() -> None:
    result = run(ROOT, "sevre")
    assert result.returncode == 1
    assert (
        "unknown command or extra 'sevre'; commands: install, serve, test; extras: cuda eval cluster otel dev"
        in result.stderr
    )


def test_extras_are_those_of_the_package_and_nothing_is_installed_into_a_named_python() -> None:
    for arguments in (("cuda", "nope"), ("eval", "serve")):
        assert f"unknown command or extra '{arguments[1]}'" in run(ROOT, *arguments).stderr
    assert "INLAID_PYTHON is set" in run(ROOT, "eval", INLAID_PYTHON=sys.executable).stderr


def test_a_named_python_that_is_not_there_is_refused() -> None:
    result = run(ROOT, "serve", INLAID_PYTHON="/no/such/python")
    assert result.returncode == 1
    assert "INLAID_PYTHON=/no/such/python is not there" in result.stderr


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = run(ROOT, "serve", INLAID_PYTHON=str(old))
    assert result.returncode == 1
    assert "older than Python 3.10" in result.stderr


def test_a_named_python_is_used_and_nothing_is_installed(tmp_path: Path) -> None:
    """A clone served with a Python of one's own: the arguments arrive and no .venv appears."""
    shutil.copy(ROOT / "install.sh", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "inlaid"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import sys; print(sys.argv[1:])")
    result = run(tmp_path, "serve", "--port", "9000", INLAID_PYTHON=sys.executable, PYTHONPATH="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['serve', '--port', '9000']"
    assert not (tmp_path / ".venv").exists()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "bash install.sh test" in (ROOT / ".ci" / "run").read_text()
    assert "bash install.sh test" in (ROOT / "README.md").read_text()


def test_the_tests_fail_where_no_browser_is_there_and_none_can_be_installed(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    result = run(ROOT, "test", INLAID_PYTHON=sys.executable, PATH=str(tmp_path))
    assert result.returncode == 1
    assert "the tests need chromium; install it: apt-get install chromium" in result.stderr
