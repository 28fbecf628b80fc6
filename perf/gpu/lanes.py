"""Run stages of bench.py in processes of their own, one after another or side by side, within limits on their time.

A lane is a list of stages that run one after another; stages joined by "+" run at the same time. Numbered lanes run
side by side, each on the GPU of its number, with its share of the cores and a scratch folder of its own, caches of
compiled kernels included: no lane warms or disturbs another.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

from inlaid.files import write_atomically
from perf.gpu import ROOT
from perf.gpu.headlines import headline

POLL = 5.0  # seconds between two updates of the archive
LEAST = 5.0  # seconds under which no stage is started
NOTHING: Mapping[str, str] = MappingProxyType({})


class Lane(threading.Thread):
    """Stages that run one after another, on the GPU and in the folder of the lane's number, if it has one."""

    def __init__(self, stages: Sequence[str], limits: Mapping[str, float], number: int | None = None) -> None:
        super().__init__(daemon=True)
        self.stages, self.limits, self.number = stages, limits, number
        self.lines: list[str] = []
        self.environment: dict[str, str] = {}
        if number is not None:
            root = ROOT / f"lane-{number}"
            self.environment = {"CUDA_VISIBLE_DEVICES": str(number), "INLAID_BENCH_ROOT": str(root)} | caches(root)

    def start_on(self, out: Path, end: float, cores: set[int]) -> None:
        """Start the thread: results go to `out`, nothing runs past `end`, and processes use `cores`."""
        self._out, self._end, self._cores = out, end, cores
        self.start()

    def run(self) -> None:
        os.sched_setaffinity(0, self._cores)  # of this thread, which the stages' processes inherit
        for together in self.stages:
            names = together.split("+")
            with ThreadPoolExecutor(len(names)) as threads:
                self.lines += threads.map(self._one, names)

    def _one(self, name: str) -> str:
        return run_limited(name, self.limits[name], self._out, self._end, self.environment)


def run_lanes(lanes: Sequence[Lane], out: Path, end: float, archive: Path | None) -> list[str]:
    """Run lanes side by side and return a line for each stage; meanwhile keep `archive`, if given, up to date."""
    cores = sorted(os.sched_getaffinity(0))
    for place, lane in enumerate(lanes):
        share = cores[len(cores) * place // len(lanes) : len(cores) * (place + 1) // len(lanes)]
        lane.start_on(out, end, set(share or cores))
    for lane in lanes:
        while lane.is_alive():
            lane.join(POLL)
            if archive is not None:
                write_archive(out, archive)
    return [line for lane in lanes for line in lane.lines]


def run_limited(stage: str, limit: float, out: Path, end: float, environment: Mapping[str, str] = NOTHING) -> str:
    """Run a stage in a process of its own for at most `limit` seconds, not past `end`; return a line about it.

    When its time is over, the stage is killed with every process that it started."""
    limit = min(limit, end - time.monotonic())
    if limit < LEAST:
        print(line := f"{stage}: failed: no time was left", flush=True)
        return line
    command = [sys.executable, "-m", "perf.gpu.bench", "--out", str(out), "--stages", stage, "--in-process"]
    begin = time.monotonic()
    with (out / f"{stage}.log").open("wb") as log:
        process = subprocess.Popen(
            command, start_new_session=True, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )  # fmt: skip
    try:
        code = process.wait(limit)
        ending = "done" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ending = f"failed: ran past {limit:.0f} s"
    about = about_result(out / f"{stage}.json")
    line = f"{stage}: {ending} after {time.monotonic() - begin:.0f} s" + (f": {about}" if about else "")
    print(line, flush=True)
    return line


def about_result(file: Path) -> str:
    """Return the headline of a result's file; nothing where there is no file."""
    try:
        return headline(json.loads(file.read_text())["result"]) if file.exists() else ""
    except Exception as error:  # noqa: BLE001 - the file has the result; the stages after this one must go on
        return f"no line about it ({type(error).__name__}: {error})"


def write_archive(folder: Path, target: Path) -> None:
    """Write all results and logs of a folder into one file, in place of the archive that was there."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as tar:
        for file in sorted(file for kind in ("json", "jsonl", "log", "md") for file in folder.glob(f"*.{kind}")):
            content = file.read_bytes()
            member = tarfile.TarInfo(file.name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    write_atomically(target, whole.getvalue())


def caches(folder: Path) -> dict[str, str]:
    """Return the variables that keep what a process compiles and measures under `folder`."""
    places = ("HUMMING_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
    return {place: str(folder / place.lower()) for place in places}
