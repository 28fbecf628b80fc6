"""Nothing is left over: no process outlives a test run, and no transport of asyncio the loop of its test."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import weakref
from collections.abc import Generator
from pathlib import Path

import pytest

WARDEN = Path(__file__).parents[1] / "perf" / "warden.py"


class OpenTransports:
    """Fails a test whose event loop has ended before a subprocess or connection of it was closed.

    Python says so when the transport is collected, which is in some later test; that one would fail instead.
    """

    def __init__(self) -> None:
        self._made: weakref.WeakSet[asyncio.BaseTransport] = weakref.WeakSet()
        self._init = asyncio.BaseTransport.__init__

    def watch(self) -> None:
        """Note each transport that is made from now on."""
        init, made = self._init, self._made

        def noted(transport: asyncio.BaseTransport, *args: object, **named: object) -> None:
            init(transport, *args, **named)  # type: ignore[arg-type]
            made.add(transport)

        asyncio.BaseTransport.__init__ = noted  # type: ignore[method-assign]

    def end(self) -> None:
        asyncio.BaseTransport.__init__ = self._init  # type: ignore[method-assign]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Generator[None]:
        yield
        loops = {each: getattr(each, "_loop", None) for each in self._made}
        over = [each for each, loop in loops.items() if loop is not None and loop.is_closed()]
        self._made.difference_update(over)
        if left := [each for each in over if not each.is_closing()]:
            pytest.fail(f"the event loop was closed before {left}: close these, or wait for their end", pytrace=False)


def pytest_configure(config: pytest.Config) -> None:
    """Watch transports, and start a warden for this run (or this worker of xdist).

    When the run ends, even by SIGKILL, the warden kills its processes. They are found by a variable in their
    environment, which they inherit from here, so tests start servers as they like. The warden itself does not have it.
    """
    transports = OpenTransports()
    transports.watch()
    config.add_cleanup(transports.end)
    config.pluginmanager.register(transports, "transports")
    mark = f"INLAID_TEST_RUN_{os.getpid()}"
    command = [sys.executable, "-I", "-S", str(WARDEN), "--mark", f"{mark}=1"]
    warden = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    os.environ[mark] = "1"

    def end() -> None:
        with warden:  # closes its pipe, and waits until what is left is killed
            pass

    config.add_cleanup(end)
