"""Rules for every test: Triton's kernels run in its interpreter without a GPU; nothing is left over (`leftovers.py`).

Triton decides on import, so the variable is set before any test module is imported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

from tests import examples, interpreter, processes
from tests.leftovers import pytest_configure as pytest_configure
from tests.processes import pytest_collection as pytest_collection
from tests.processes import pytest_runtestloop as pytest_runtestloop

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also the long form of tests that have a short one")
    processes.pytest_addoption(parser)


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


def pytest_sessionstart(session: pytest.Session) -> None:
    examples.load_profile(session.config.getoption("--long"))


def pytest_collection_finish() -> None:
    interpreter.spare()


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
