"""Profiles of the engine process: torch's profiler around the steps, written as a trace that browsers show."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


class Profiler:
    """At most one profile at a time. Both methods run on the thread of the step loop, which is what is profiled."""

    def __init__(self) -> None:
        self._running: Any = None
        self._folder = Path()

    def start(self, folder: str) -> None:
        """Begin to record. ValueError: a profile is running, or the folder cannot be used."""
        from torch import cuda
        from torch.profiler import ProfilerActivity, profile

        if self._running is not None:
            raise ValueError("a profile is running already; end it with /stop_profile")
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--profile-dir {folder} cannot be used: {error.strerror}") from error
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda.is_available() else [])]
        self._running = profile(activities=activities)
        self._running.start()

    def stop(self) -> str:
        """Write the trace and return its path. ValueError: no profile is running."""
        running, self._running = self._running, None
        if running is None:
            raise ValueError("no profile is running; begin one with /start_profile")
        running.stop()
        file = self._folder / f"inlaid-{time.strftime('%Y%m%d-%H%M%S')}.json.gz"
        running.export_chrome_trace(str(file))
        return str(file)
