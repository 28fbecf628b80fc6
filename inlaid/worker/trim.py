"""Give freed memory back to the system again and again.

The C library keeps what a thread has freed for that thread's next requests: after a few long bodies each thread of the
server held 64 MiB for good. To ask for it back once in a while costs milliseconds and keeps the process as small as
what it holds.
"""

from __future__ import annotations

import ctypes
import threading
import time

_INTERVAL = 30.0  # seconds


def give_back() -> bool:
    """Return freed memory to the system. False: this C library cannot (it is not glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)  # the interpreter lock is not held meanwhile
    return True


def keep_giving_back(interval: float = _INTERVAL) -> None:
    """Do so for the rest of this process's life, on a thread of its own."""

    def run() -> None:
        while give_back():
            time.sleep(interval)

    threading.Thread(target=run, name="memory", daemon=True).start()
