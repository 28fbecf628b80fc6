"""The end of a process that another one has started: with the other one, whatever either is doing."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_GRACE = 3.0  # seconds from the other end's closing to the end of this process, whatever it is doing


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that has started it ends, even while a library holds the
    interpreter's lock."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)  # the parent has ended meanwhile


def end_with(connection: socket.socket) -> None:
    """End this process some seconds after the other end has closed, if a long load or step keeps it from ending."""
    threading.Thread(target=_watch, args=(connection,), daemon=True).start()


def has_closed(connection: socket.socket) -> bool:
    """Return whether the other end has closed."""
    poller = _poller(connection)
    return bool(poller.poll(0))


def _watch(connection: socket.socket) -> None:
    _poller(connection).poll()
    time.sleep(_GRACE)
    os._exit(0)


def _poller(connection: socket.socket) -> select.poll:
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP if hasattr(select, "POLLRDHUP") else 0)
    return poller
