"""Processes of an experiment: started under a warden, watched, and always ended. Used by `perf.attempt`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 10.0


class Supervised:
    """One command under `perf.warden`; its output goes to files, so no pipe can fill up and block it."""

    def __init__(
        self, command: list[str], directory: Path, name: str, env: dict[str, str], keep_open: Sequence[int] = ()
    ) -> None:
        self.name, self.log = name, directory / f"{name}.log"
        self.error_log = directory / f"{name}.error.log"
        warden = [sys.executable, "-I", "-S", str(ROOT / "perf" / "warden.py"), "--grace", str(GRACE_S), "--", *command]
        with self.log.open("wb") as out, self.error_log.open("wb") as err:
            self.process = subprocess.Popen(
                warden,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env=env,
                start_new_session=True,
                pass_fds=keep_open,
            )

    def ended(self) -> int | None:
        """Exit code, or None while it runs."""
        return self.process.poll()

    def wait(self, timeout_s: float) -> int | None:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End the command and all it started, and return when they are gone."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def last_words(self) -> str:
        """Return the last line of its error output, or else of its output: most likely the reason."""
        for log in (self.error_log, self.log):
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return lines[-1][:300]
        return "it said nothing"


def child_environment(overrides: dict[str, str]) -> dict[str, str]:
    """Merge the parent's environment with the config's, which wins."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, **overrides}


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def wait_ready(server: Supervised, url: str, timeout_s: float) -> str:
    """Wait until the server answers 200; return why it will not, or nothing."""
    end = time.monotonic() + timeout_s
    while not answers(url):
        code = server.wait(0.1)
        if code is not None:
            return f"the server exited with {code} before it was ready: {server.last_words()}"
        if time.monotonic() > end:
            return f"the server did not answer {url} within {timeout_s:g} s: {server.last_words()}"
    return ""
