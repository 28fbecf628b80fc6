"""Replicas that Ray Serve places, on this machine: a killed actor's streams go on elsewhere, and Serve brings it back.

Ray takes a minute to start on a busy machine, so this runs with --long, where Ray is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'inlaid[cluster]'")
def test_streams_survive_an_actor_and_serve_brings_it_back() -> None:
    """Run the check in a process of its own: Ray keeps threads and handlers that no test may leave behind."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ray_check.py"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all as on one engine"


def test_without_ray_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from inlaid.cluster.ray_app import ray_replicas
    from inlaid.config import ConfigError

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'inlaid\[cluster\]'"):
        ray_replicas("auto", None, 0.0, {})
