"""One browser and one server with 1,000 adapters under load for all tests of the page. The server can be restarted."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server
from tests.fork_server import Fork
from tests.server.live import ADMIN_KEY, DEMO, ROOT

API_KEY = "api-secret"
NUM_ADAPTERS = 1000


def chromium() -> str:
    """Return Debian's browser. Without it the tests fail: `bash install.sh test` installs it."""
    found = shutil.which("chromium")
    if found is None:
        pytest.fail("chromium is not there: apt-get install chromium, or run bash install.sh test as root")
    return found


@dataclass
class FakeServer:
    """A server of `fake_server.py`, on a port that it keeps."""

    flags: tuple[str, ...]
    bank: Path
    num_senders: int = 4
    port: int = 0
    process: subprocess.Popen[str] | Fork | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it serves."""
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "tests.console.fake_server", str(self.port), str(NUM_ADAPTERS)]
        self.process = fork_server.popen(
            [*command, str(self.num_senders), *self.flags],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            engines=1,
        )
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if line.startswith("at: "):
                return
        pytest.fail("the server did not come up:\n" + "".join(said))

    def stop(self) -> None:
        """End it at once."""
        if self.process is not None:
            assert self.process.stdout is not None
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start a browser. While it is open this thread has a running event loop, so it ends with the module."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        started = playwright.chromium.launch(executable_path=chromium(), args=flags)
        yield started
        started.close()


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    bank = tmp_path_factory.mktemp("console") / "bank"
    runtime = ("--allow-runtime-lora", "--lora-root", str(DEMO / "adapters"), "--online-tasks", str(bank))
    flags = ("--admin-key", ADMIN_KEY, "--api-key", API_KEY, *runtime, "--log-level", "error")
    server = FakeServer(flags, bank)
    try:
        server.start()
        yield server
    finally:
        server.stop()
