"""Finds processes by a mark in their environment, to show that none is left behind."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path


def marked_processes(mark: str) -> list[str]:
    """Command lines of the live processes that inherited the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def wait_until_gone(mark: str, timeout_s: float = 30.0) -> list[str]:
    """Return the processes that are left after a while; empty as soon as none is."""
    end = time.monotonic() + timeout_s
    while (left := marked_processes(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    return left
