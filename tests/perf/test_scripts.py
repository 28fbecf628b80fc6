"""The scripts a user runs against a server that is up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf.process import ROOT, free_port
from tests import fork_server


@pytest.fixture(scope="module")
def fake() -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "perf.fake_server", "--port", str(port), "--ttft-ms", "5", "--itl-ms", "1"]
    with fork_server.popen([*command, "--adapter", "a=x"]) as server:
        yield f"http://127.0.0.1:{port}"
        server.terminate()


def run(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = ["bash", str(ROOT / "perf" / script), *arguments]
    full = {**os.environ, "PYTHON": sys.executable, **env}
    return subprocess.run(command, env=full, capture_output=True, check=False)


def test_run_exp_test(fake: str) -> None:
    done = run("run_exp_test.sh", fake, "--no-progress", "--rate", "50")
    assert done.returncode == 0
    assert b"12 / 0" in done.stdout


def test_run_exp_measures_each_rate_once_and_reports(fake: str, tmp_path: Path) -> None:
    settings = {"RATES": "40 80", "DURATION": "0.5", "INPUT": "fixed:8", "OUTPUT": "fixed:4", "OUT": str(tmp_path)}
    assert run("run_exp.sh", fake, "--no-progress", **settings).returncode == 0
    assert {path.name for path in tmp_path.glob("*.json")} == {"rate-40.json", "rate-80.json"}
    assert json.loads((tmp_path / "rate-80.json").read_text())["failed"] == 0
    assert (tmp_path / "report.html").exists()
    stamp = (tmp_path / "rate-40.json").stat().st_mtime_ns
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$2"\n')
    python.chmod(0o755)
    again = run("run_exp.sh", fake, "--no-progress", **settings, PYTHON=str(python))
    assert again.stdout.split() == [b"perf.report"], "nothing is measured twice"
    assert (tmp_path / "rate-40.json").stat().st_mtime_ns == stamp


def test_no_server_is_one_clear_line() -> None:
    done = run("run_exp_test.sh", "http://127.0.0.1:9", "--no-progress", "--ready-timeout", "0.5")
    assert done.returncode == 2
    assert b"is the server up?" in done.stderr
