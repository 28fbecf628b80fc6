"""Random kills of the quantizer: a killed job that is started again ends in the bits of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.grid import Grid
from inlaid.quant.quantize import quantize
from inlaid.quant.settings import Gate, Settings, TaskSource
from tests.quant.tiny import write_adapter, write_base, write_data

_SETTINGS = Settings(Grid(4, 32), CalibrationSettings(held_out=0.25), "mean")
_ANYWAY = Gate(force=True)  # random models fit nothing


class QuantizerKills:
    """A tiny base with two tasks, and the folder that an undisturbed job makes of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._draw = random.Random(seed)
        self._folder = folder
        self._base = write_base(folder / "base")
        self._tasks = [
            TaskSource(name, write_adapter(folder / name, self._base, n), write_data(folder / f"{name}.jsonl", n))
            for n, name in enumerate("ab")
        ]
        began = time.monotonic()
        self._quantize(folder / "expected")
        self._seconds = time.monotonic() - began
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self, kills: int, seconds: float) -> None:
        """Kill so many times, or for so many seconds."""
        out, ends = self._folder / "out", time.monotonic() + seconds
        while self.counts["kills of the quantizer"] < kills and time.monotonic() < ends:
            status = self._started_and_killed(out)
            if os.WIFSIGNALED(status):
                self.counts["kills of the quantizer"] += 1
                if out.exists():
                    self._compare(out, "a killed job left part of a folder")
            elif os.waitstatus_to_exitcode(status) != 0:
                self.faults.append(f"a job ended with {os.waitstatus_to_exitcode(status)}")
            else:
                self.counts["jobs that were resumed and ended"] += 1
                self._compare(out, "other bits")
                for left in [*self._folder.glob("out*"), *self._folder.glob(".out*")]:
                    shutil.rmtree(left)

    def _quantize(self, out: Path) -> None:
        quantize(self._base, self._tasks, _SETTINGS, out, gate=_ANYWAY)

    def _started_and_killed(self, out: Path) -> int:
        """Run the job in a process of its own, kill it at a random moment, and return its status."""
        child = os.fork()
        if child == 0:
            try:
                self._quantize(out)
            except BaseException:  # noqa: BLE001 - the process ends here, whatever it was
                os._exit(1)
            os._exit(0)
        time.sleep(self._draw.uniform(0.0, self._seconds))
        os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]

    def _compare(self, out: Path, what: str) -> None:
        expected = {file.name: file.read_bytes() for file in (self._folder / "expected").glob("*.safetensors")}
        if {file.name: file.read_bytes() for file in out.glob("*.safetensors")} != expected:
            self.faults.append(what)
