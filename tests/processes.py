"""Several processes for one run of tests, by `--processes N`: tests are collected once, then forks of this process run
them file by file and report here.

Workers of pytest-xdist start anew. Each imports torch and collects every test before its first, which takes 28 seconds
of a processor. After a CUDA call a process cannot be forked, so a machine with a GPU has pytest-xdist.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from tests import fork_server

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--processes", type=int, default=0, metavar="N", help="run files of tests in N forks of pytest")


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Look for garbage in nothing that collecting has made: modules, functions and tests stay to the end."""
    session.config.add_cleanup(gc.unfreeze)  # nanobind counts what is left at the end
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    option = session.config.option
    if not option.processes or option.collectonly or session.testsfailed:
        fork_server.prepare()
        return None  # pytest's own loop
    session.config.stash[_files] = _parts(session.items)
    _Run(session).run(option.processes)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    return True


_files = pytest.StashKey[list[list[pytest.Item]]]()


def _parts(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """Return the tests of each file; files of which a test is marked together are one part."""
    parts: dict[object, list[pytest.Item]] = {}
    for path, tests in groupby(items, lambda item: item.path):
        own = list(tests)
        names = [mark.args[0] for item in own for mark in item.iter_markers("together")]
        parts.setdefault(names[0] if names else path, []).extend(own)
    return list(parts.values())


@dataclass
class _Fork:
    process: BaseProcess
    test: tuple[str, Any] | None = None  # id and location of the one that it runs


class _Run:
    """Hands out files, and passes on what the forks report."""

    def __init__(self, session: pytest.Session) -> None:
        self._session, self._hook = session, session.config.hook
        self._next = 0
        self._left = {item.nodeid: item.location for item in session.items}

    def run(self, number: int) -> None:
        if (threads := threading.active_count()) > 1:
            raise pytest.UsageError(
                f"{threads} threads after collecting, and a fork has one; start none while a test file is imported"
            )
        forks = dict(self._fork() for _ in range(number))
        while forks:
            for connection in wait(list(forks)):
                assert isinstance(connection, Connection)
                try:
                    name, told = connection.recv()
                    self._take(connection, forks[connection], name, told)
                except (EOFError, ConnectionResetError):
                    self._end(forks.pop(connection))
                    connection.close()
        if not self._session.shouldfail:
            for test in list(self._left.items()):
                self._fail(test, "not run: the process that was to run it has ended")

    def _fork(self) -> tuple[Connection, _Fork]:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=_work, args=(self._session, theirs))
        process.start()
        theirs.close()
        return ours, _Fork(process)

    def _take(self, connection: Connection, fork: _Fork, name: str, told: Any) -> None:
        """Answer a fork that wants a file, or pass on a report."""
        if name == "next":
            more = self._next < len(self._session.config.stash[_files]) and not self._session.shouldfail
            connection.send(self._next if more else None)
            self._next += more
        elif name == "report":
            report = self._hook.pytest_report_from_serializable(config=self._session.config, data=told)
            self._hook.pytest_runtest_logreport(report=report)
        elif name == "start":
            fork.test = told
            self._hook.pytest_runtest_logstart(nodeid=told[0], location=told[1])
        else:
            fork.test = None
            del self._left[told[0]]
            self._hook.pytest_runtest_logfinish(nodeid=told[0], location=told[1])

    def _end(self, fork: _Fork) -> None:
        """Report a fork that has died, and in which test."""
        fork.process.join()
        if code := fork.process.exitcode or fork.test is not None:
            test = fork.test or ("the end of the session", (str(self._session.config.rootpath), None, "teardown"))
            self._fail(test, f"its process ended with exit code {code}")

    def _fail(self, test: tuple[str, Any], why: str) -> None:
        self._left.pop(test[0], None)
        report = pytest.TestReport(*test, keywords={}, outcome="failed", longrepr=why, when="call")
        self._hook.pytest_runtest_logreport(report=report)


class _Reports:
    """Sends what happens in a fork to the process that has collected."""

    def __init__(self, config: pytest.Config, connection: Connection) -> None:
        self._config, self._connection = config, connection

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self._connection.send(("start", (nodeid, location)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._connection.send(("report", told))

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        self._connection.send(("finish", (nodeid, location)))


def _work(session: pytest.Session, connection: Connection) -> None:
    """Run files until there is none left. Fixtures of the session live until then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    fork_server.prepare()
    _own_output(session.config)
    session.config.pluginmanager.register(_Reports(session.config, connection))
    while not session.shouldfail and not session.shouldstop:
        connection.send(("next", None))
        if (number := connection.recv()) is None:
            break
        items = session.config.stash[_files][number]
        for item, behind in zip(items, [*items[1:], session], strict=True):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=behind)
            if session.shouldfail or session.shouldstop:
                break
    session._setupstate.teardown_exact(None)


def _own_output(config: pytest.Config) -> None:
    """Give this fork files of its own to capture output in, and its reporter nothing to write to."""
    capture = config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    capture.stop_global_capturing()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.close(silence)
    capture.start_global_capturing()
    capture.suspend_global_capture()
