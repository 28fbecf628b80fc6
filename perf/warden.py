"""Guard of processes: let nothing that an owner started outlive it.

    python -m perf.warden [--grace SECONDS] -- COMMAND ARG ...
    python -m perf.warden --mark NAME=VALUE

The owner (`perf.process`) holds the other end of standard input. When it closes it, or dies in whatever way,
the command and everything it started, in whatever process group, is ended: SIGTERM, a grace, SIGKILL.
The warden's output is the command's, and so is its exit code. With a mark it starts nothing: when the owner is gone,
every process that inherited this environment variable is killed (`tests/conftest.py` guards a test run so).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
STOPPED = 143


class Stopped(Exception):
    """SIGTERM or SIGINT to the warden itself."""


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Stopped


def _prctl(option: int, value: int) -> None:
    """Call Linux's prctl; elsewhere only the process group can be ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants(root: int) -> list[int]:
    """List every process below `root`, without zombies."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry.name))
    found, frontier = [], [root]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, [])]
        found += frontier
    return found


def marked(mark: str) -> list[int]:
    """List the processes whose environment holds the mark "NAME=VALUE", without this one; zombies have none."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended meanwhile, or belongs to another user
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def guard_marked(mark: str) -> None:
    """Wait for the owner's end, by its closed pipe or by its death, then kill every process with the mark."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    with contextlib.suppress(Stopped):
        while os.read(0, 1024):
            pass
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    while left := marked(mark):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _signal_group(group: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)


def _end_everything(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """End the command's group with SIGTERM; after the grace kill its remaining descendants, adopted here as orphans."""
    _signal_group(child.pid, signal.SIGTERM)
    end = time.monotonic() + grace_s
    while time.monotonic() < end and (child.poll() is None or descendants(os.getpid())):
        time.sleep(0.05)
    _signal_group(child.pid, signal.SIGKILL)
    while left := descendants(os.getpid()):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.02)


def guard(command: list[str], grace_s: float) -> int:
    """Run the command; return its exit code, or STOPPED when it was ended for its owner."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent)
    owner_gone = False
    try:
        while child.poll() is None and not owner_gone:
            readable, _, _ = select.select([0], [], [], 0.1)
            owner_gone = bool(readable) and not os.read(0, 1024)
    except Stopped:
        owner_gone = True
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    _end_everything(child, grace_s if owner_gone else 0.0)
    return STOPPED if owner_gone else child.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="perf.warden", description="Run a command that dies with its owner.")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--mark", metavar="NAME=VALUE", help="kill what has this in its environment; start no command")
    parser.add_argument("command", nargs="*")
    arguments = parser.parse_args(argv)
    if bool(arguments.mark) == bool(arguments.command):
        parser.error("give either a command or --mark NAME=VALUE")
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _stop)
    if arguments.mark:
        guard_marked(arguments.mark)
        return 0
    try:
        return guard(arguments.command, arguments.grace)
    except FileNotFoundError as error:
        print(f"perf.warden: {error}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
