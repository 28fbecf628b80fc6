"""Processes of `python -m MODULE` for tests, forked from one that has imported everything.

A server and its engine import for three seconds of a processor, and tests start dozens. So each process that runs
tests forks a server of forks before its first test, while it has one thread and no connection; this one forks what
tests start. A forked server has forks for its engines too, each of which waits until it is needed. What is not to
differ from a user's start (signals, descriptors, memory, kills) is tested on processes that are started anew.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import gc
import logging
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

ENGINE = "inlaid-engine"  # what the kernel calls a forked engine
_CODE = "-c"
_MOST_DESCRIPTORS = 1 << 16
_MOST_BYTES = 1 << 17  # of an order
_Output = IO[Any] | int | None  # as subprocess takes it: PIPE, STDOUT, a file or its descriptor
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # linux/prctl.h


@dataclass(frozen=True)
class _Order:
    """The work of a fork: to be `python -m module …` or `python -c code …`, or to call a function."""

    module: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    folder: str
    engines: int
    call: tuple[Callable[..., Any], tuple[Any, ...]] | None = None


class Fork:
    """A process that a server of forks has made, as subprocess.Popen shows its own."""

    def __init__(self, pid: int, told: int, stdout: IO[Any] | None) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._told = told  # where its status will come from

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. TimeoutExpired: it still runs."""
        if self._look(timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *error: object) -> None:
        if self.stdout is not None:
            self.stdout.close()
        self.wait()

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            ready, _, _ = select.select([self._told], [], [], timeout)
            if ready:
                self.returncode = os.waitstatus_to_exitcode(int.from_bytes(os.read(self._told, 4), "little"))
                os.close(self._told)
        return self.returncode


class ForkServer:
    """Forks this process, which then forks others on demand until this one ends."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        parent = os.getpid()
        if os.fork() == 0:
            _in_a_fork(parent, partial(_serve, theirs))
        theirs.close()
        atexit.register(self._orders.close)

    def start(self, order: _Order, stdout: _Output = None, stderr: _Output = None, text: bool = True) -> Fork:
        """Make a fork, with outputs as subprocess takes them."""
        ours, theirs = os.pipe()
        shown, piped = os.pipe() if stdout == subprocess.PIPE else (None, None)
        out = _descriptor(stdout, 1) if piped is None else piped
        with self._lock:
            err = out if stderr == subprocess.STDOUT else _descriptor(stderr, 2)
            socket.send_fds(self._orders, [pickle.dumps(order)], [theirs, out, err])
        os.close(theirs)
        if piped is not None:
            os.close(piped)
        pid = int.from_bytes(os.read(ours, 4), "little")
        return Fork(pid, ours, None if shown is None else os.fdopen(shown, "r" if text else "rb"))


def _descriptor(output: _Output, otherwise: int) -> int:
    """Return what a fork is to write to."""
    return otherwise if output is None else output if isinstance(output, int) else output.fileno()


@cache
def of_this_process(pid: int) -> ForkServer | None:
    """Return the server of a process of tests, made when this is first called; None where there cannot be one.

    After a CUDA call a process cannot be forked, nor one that has threads."""
    torch = sys.modules.get("torch")
    forkable = sys.platform == "linux" and threading.active_count() == 1
    return ForkServer() if forkable and not (torch is not None and torch.cuda.is_available()) else None


def prepare() -> None:
    """Make the server before the first test runs."""
    of_this_process(os.getpid())


def popen(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdout: _Output = None,
    stderr: _Output = None,
    text: bool = False,
    engines: int = 0,
) -> Fork | subprocess.Popen[Any]:
    """Start `python -m MODULE …` in a fork, or `python -c CODE …`. Its first `engines` engines, if it is to have some,
    are forks too."""
    server = of_this_process(os.getpid())
    python, flag, module, *arguments = command
    assert python == sys.executable, "a fork is of this Python"
    assert flag in ("-m", "-c"), "a fork begins as a module or as code"
    if server is None:
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=stdout, stderr=stderr, text=text)
    given = dict(os.environ if env is None else env)
    arguments = arguments if flag == "-m" else [module, *arguments]
    order = _Order(module if flag == "-m" else _CODE, tuple(arguments), given, str(cwd or Path.cwd()), engines)
    return server.start(order, stdout, stderr, text)


def run(
    command: Sequence[str], *, check: bool = False, stdout: _Output = None, text: bool = False, **more: Any
) -> subprocess.CompletedProcess[Any]:
    """Run `python -m MODULE …` or `python -c CODE …` in a fork to its end, as subprocess.run does."""
    with popen(command, stdout=stdout, text=text, **more) as process:
        said = None if process.stdout is None else process.stdout.read()
        done = subprocess.CompletedProcess(command, process.wait(), said)
    if check:
        done.check_returncode()
    return done


def stand_in(**options: Any) -> SimpleNamespace:
    """Return what a module that starts Python by `subprocess` may have in its place."""
    names = ("PIPE", "STDOUT", "DEVNULL", "TimeoutExpired")
    return SimpleNamespace(
        Popen=partial(popen, **options), run=run, **{name: getattr(subprocess, name) for name in names}
    )


def call(function: Callable[..., Any], *given: Any) -> Fork | None:
    """Call a function of a module in a fork; None where there is no server of forks."""
    server = of_this_process(os.getpid())
    order = _Order("", (), dict(os.environ), str(Path.cwd()), 0, (function, given))
    return None if server is None else server.start(order)


# The server of forks, and between it and each fork a process that waits for its end.


def _serve(orders: socket.socket) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    _close_all_but(orders.fileno())
    own = os.getpid()
    while True:
        data, descriptors, _, _ = socket.recv_fds(orders, _MOST_BYTES, 3)
        if not data:
            return 0
        if os.fork() == 0:
            orders.close()
            _in_a_fork(own, partial(_keep, data, *descriptors))
        for each in descriptors:
            os.close(each)


def _keep(data: bytes, told: int, out: int, err: int) -> int:
    """Fork once more; tell the fork's number, and how it ends."""
    order: _Order = pickle.loads(data)  # noqa: S301 - of the process that this one is forked from
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    own = os.getpid()
    if (pid := os.fork()) == 0:
        _in_a_fork(own, partial(_obey, order, out, err))
    os.close(out)
    os.close(err)
    os.write(told, pid.to_bytes(4, "little"))
    os.write(told, os.waitpid(pid, 0)[1].to_bytes(4, "little"))
    return 0


def _obey(order: _Order, out: int, err: int) -> int:
    """Make this process one that has just started, and do what the order says."""
    null = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((null, out, err)):
        os.dup2(descriptor, number)
    _close_all_but(2)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _set_environment(order.environment)
    os.chdir(order.folder)
    logging.getLogger().handlers.clear()
    logging.getLogger().setLevel(logging.WARNING)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    gc.enable()
    if order.call is not None:
        function, given = order.call
        function(*given)
        return 0
    if order.engines:
        from inlaid.worker import link

        link.start_process = _Seats(order.engines).start
    return _run(order.module, order.arguments)


def _run(module: str, arguments: Sequence[str]) -> int:
    """Do what `python -m module …` does, and return its exit code."""
    if module == _CODE:
        code, *arguments = arguments
        sys.argv = [_CODE, *arguments]
        return _exit_code(partial(exec, code, {"__name__": "__main__"}))
    sys.argv = [module, *arguments]
    if not hasattr(sys.modules.get(module), "__path__"):
        sys.modules.pop(module, None)  # it is read again, as the main module
    return _exit_code(partial(runpy.run_module, module, run_name="__main__", alter_sys=True))


def _exit_code(main: Callable[[], Any]) -> int:
    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


# Engines of a forked server: its own forks, made before it has threads.


class _Seats:
    """Forks that wait until the server starts an engine; those behind the last are started anew."""

    def __init__(self, number: int) -> None:
        from inlaid.worker import link

        self._anew = link.start_process
        self._free = [_seat() for _ in range(number)]

    async def start(self, descriptor: int, modules: Sequence[str], environment: Mapping[str, str]) -> Any:
        """Stand for `inlaid.worker.link.start_process`."""
        if not self._free:
            return await self._anew(descriptor, modules, environment)
        pid, connection = self._free.pop()
        order = (tuple(modules), {**os.environ, **environment})
        socket.send_fds(connection, [pickle.dumps(order)], [descriptor])
        return _Engine(pid, connection)


def _seat() -> tuple[int, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    own = os.getpid()
    if (pid := os.fork()) == 0:
        _in_a_fork(own, partial(_wait_in_seat, theirs))
    theirs.close()
    return pid, ours


def _wait_in_seat(orders: socket.socket) -> int:
    _close_all_but(orders.fileno())  # this one is open until the process ends, which the server sees
    data, descriptors, _, _ = socket.recv_fds(orders, _MOST_BYTES, 1)
    if not data:
        return 0
    modules, environment = pickle.loads(data)  # noqa: S301 - of the server that this one is forked from
    _set_environment(environment)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, ENGINE.encode())
    return _run("inlaid.worker.process", [str(descriptors[0]), *modules])


class _Engine:
    """A forked engine, as asyncio shows a subprocess of its own."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._loop.add_reader(connection, self._end)

    async def wait(self) -> int | None:
        await asyncio.shield(self._ended)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def _end(self) -> None:
        """Its end of the connection has closed."""
        self._loop.remove_reader(self._connection)
        self._connection.close()
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended.set_result(None)


def _in_a_fork(parent: int, body: Callable[[], int]) -> NoReturn:
    """Run the rest of this process, which ends with its parent."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            code = body()
            threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does at its end
    except BaseException:  # noqa: BLE001 - nothing of the process that was forked may go on here
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(code)


def _set_environment(environment: Mapping[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _close_all_but(kept: int) -> None:
    os.closerange(3, max(3, kept))
    os.closerange(max(3, kept + 1), _MOST_DESCRIPTORS)
