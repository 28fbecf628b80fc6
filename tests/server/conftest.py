"""One server on the demo for all tests that do it no harm."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.live import ADMIN_KEY, DEMO, Live, serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let all tests of the server below run in one process: each would start its own."""
    for item in items:
        if "adapter_root" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.together("server"))


@pytest.fixture(scope="session")
def adapter_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder that the server may load adapters from, with one in it."""
    root = tmp_path_factory.mktemp("adapters")
    shutil.copytree(DEMO / "adapters" / "to_velar", root / "velar")
    return root


@pytest.fixture(scope="session")
def server(adapter_root: Path) -> Iterator[Live]:
    flags = ["--allow-runtime-lora", "--admin-key", ADMIN_KEY, "--lora-root", str(adapter_root)]
    with serving(*flags, "--max-body-mib", "1", "--max-prompts", "16", forked=False) as live:
        yield live
