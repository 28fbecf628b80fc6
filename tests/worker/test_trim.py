"""Memory that threads have freed goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# Threads at once, so that each has memory of its own in the C library; small pieces, the last of them kept: what is
# freed below it stays with the thread.
PROGRAM = """
import ctypes, sys, threading, time
from inlaid.worker.trim import give_back, keep_giving_back

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
barrier, kept = threading.Barrier(4), []

def use():
    pieces = [libc.malloc(65536) for _ in range(400)]
    for piece in pieces:
        ctypes.memset(piece, 1, 65536)
    barrier.wait()
    for piece in pieces[:-1]:
        libc.free(piece)
    barrier.wait()

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) >> 10

before = resident()
threads = [threading.Thread(target=use) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(resident() - before)
if sys.argv[1] == "once":
    assert give_back()
else:
    keep_giving_back(0.01)
    until = time.monotonic() + 60
    while resident() - before > 20 and time.monotonic() < until:
        time.sleep(0.01)
print(resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library is not glibc")
@pytest.mark.parametrize("way", ["once", "again"])
def test_what_threads_have_freed_goes_back_to_the_system(way: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True, timeout=120)
    held, left = map(int, done.stdout.split())
    assert held > 60, "the C library keeps it"
    assert left < 20
