"""Processes of an experiment as forks of the tests' process, which import nothing; users have `perf.process`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perf.process import Supervised
from tests import fork_server


class Forked(Supervised):
    """One command without a warden: the server of forks ends it, should the tests not."""

    def __init__(
        self, command: list[str], directory: Path, name: str, env: dict[str, str], keep_open: Sequence[int] = ()
    ) -> None:
        self.name, self.log = name, directory / f"{name}.log"
        self.error_log = directory / f"{name}.error.log"
        with self.log.open("wb") as out, self.error_log.open("wb") as err:
            self.process: Any = fork_server.popen(command, env=env, stdout=out, stderr=err, engines=1)

    def stop(self) -> None:
        """End the command."""
        self.process.terminate()
        self.process.wait()
