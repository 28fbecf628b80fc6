"""Rules for every test: Triton's kernels run in its interpreter without a GPU, and no process outlives a test run.

Triton decides on import, so the variable is set before any test module is imported.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

WARDEN = Path(__file__).parents[1] / "perf" / "warden.py"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also the long form of tests that have a short one")


HEAVY = ("perf", "eval", "quant", "runner", "oracle", "console", "cluster", "chaos", "server")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put heavy folders first, so that no worker is left alone with one, and skip what is marked long unless the run
    is."""

    def weight(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return HEAVY.index(folder) if folder in HEAVY else len(HEAVY)

    items.sort(key=weight)
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="a long form, of which another test is the short one: --long"))


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Say whether tests that have a short form run whole."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Take away what a command that ran here has set up: its handler writes to the stderr of its own test."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)
    root.setLevel(level)


def pytest_configure(config: pytest.Config) -> None:
    """Start a warden for this run (or this worker of xdist): when it ends, even by SIGKILL, its processes are killed.

    Processes are found by a variable in their environment, which they inherit from here, so tests start servers as they
    like. The warden itself does not have it.
    """
    mark = f"INLAID_TEST_RUN_{os.getpid()}"
    command = [sys.executable, "-I", "-S", str(WARDEN), "--mark", f"{mark}=1"]
    warden = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    os.environ[mark] = "1"

    def end() -> None:
        with warden:  # closes its pipe, and waits until what is left is killed
            pass

    config.add_cleanup(end)
