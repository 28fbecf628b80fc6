"""Measure where an engine's start spends its seconds, and under which choices it is shorter: stages `starts-SHAPE`.

Each start is a process of its own: `python -m perf.gpu.starts SHAPE CHOICE…` builds the engine as the server does,
samples the position of its main thread every few milliseconds, and prints JSON. The first start of a stage may have to
compile; those after it have warm caches.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from types import FrameType, MappingProxyType
from typing import Any

from perf.gpu import Keep
from perf.gpu.serving import files

INTERVAL = 0.003  # seconds between two samples
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cold": (),
        "warm": (),
        "threads take turns every 0.2 ms": ("switch",),
        "warm again": (),
    }
)


class Watch(threading.Thread):
    """Sample where a thread is: its innermost line within inlaid, and its innermost line of all."""

    def __init__(self, ident: int) -> None:
        super().__init__(daemon=True)
        self.ident_watched, self.over = ident, threading.Event()
        self.ours: Counter[str] = Counter()
        self.innermost: Counter[str] = Counter()
        self.samples = 0

    def run(self) -> None:
        while not self.over.wait(INTERVAL):
            frame = sys._current_frames().get(self.ident_watched)
            if frame is not None:
                self.samples += 1
                self.innermost[_line(frame)] += 1
                while frame is not None and "/inlaid/" not in frame.f_code.co_filename:
                    frame = frame.f_back
                if frame is not None:
                    self.ours[_line(frame)] += 1

    def found(self, seconds: float) -> dict[str, Any]:
        share = seconds / max(1, self.samples)
        return {
            name: {line: round(count * share, 2) for line, count in counter.most_common(40)}
            for name, counter in (("ours", self.ours), ("innermost", self.innermost))
        }


def _line(frame: FrameType) -> str:
    code = frame.f_code
    return f"{'/'.join(code.co_filename.split('/')[-3:])}:{frame.f_lineno} {code.co_name}"


def one(shape: str, choices: list[str]) -> dict[str, Any]:
    """Start an engine in this process; return its seconds, its log lines and where its main thread was."""
    from perf.gpu import offline

    interval, root, lines = sys.getswitchinterval(), logging.getLogger(), _Lines()
    level = root.level
    root.addHandler(lines)
    root.setLevel(logging.INFO)
    if "switch" in choices:
        sys.setswitchinterval(2e-4)
    watch = Watch(threading.get_ident())
    begin = time.perf_counter()
    watch.start()
    try:
        offline.load(shape, max(some for some, _, _ in offline.ROWS[shape]))
    finally:
        watch.over.set()
        watch.join()
        seconds = time.perf_counter() - begin
        sys.setswitchinterval(interval)
        root.setLevel(level)
        root.removeHandler(lines)
    return {"seconds": seconds, "log": lines.heard, **watch.found(seconds)}


class _Lines(logging.Handler):
    """The log lines about a start."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "start-up" in record.getMessage():
            self.heard.append(record.getMessage())


def run(shape: str, keep: Keep) -> dict[str, Any]:
    """Start an engine under each of CHOICES, one after the other."""
    from perf.gpu import offline

    files(shape, offline.RANKS[shape], max(some for some, _, _ in offline.ROWS[shape]))
    report: dict[str, Any] = {"shape": shape, "starts": []}
    command = partial(subprocess.run, stdout=subprocess.PIPE, text=True)
    for name, choices in CHOICES.items():
        begin = time.monotonic()
        done = command([sys.executable, "-m", "perf.gpu.starts", shape, *choices])
        found = {"caches": name, "ready_s": time.monotonic() - begin}
        last = done.stdout.splitlines()[-1] if done.stdout.strip() else "{}"
        report["starts"].append(found | (json.loads(last) if done.returncode == 0 else {"error": done.returncode}))
        keep(report)
        print(name, found["ready_s"], flush=True)
    return report


if __name__ == "__main__":
    print(json.dumps(one(sys.argv[1], sys.argv[2:])))
