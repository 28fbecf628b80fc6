"""Threads of a quantizing job sleep while they wait, and are set up before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOWN = """
import os, sys
from inlaid import cli
assert "torch" not in sys.modules
cli.parse(["task", "list", "nowhere"])
import torch
print(os.environ["OMP_WAIT_POLICY"], torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, f"PASSIVE {max(1, len(os.sched_getaffinity(0)) - 1)}"),
        ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "2"}, "ACTIVE 2"),
    ],
)
def test_threads(given: dict[str, str], expected: str) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment = plain | {"PYTHONPATH": os.getcwd()} | given
    done = subprocess.run([sys.executable, "-c", SHOWN], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
