"""One point of a grid, with nothing left open: the server, the workload and the environment.

Made by `perf.template`, written to the archive as JSON, read back on resume, run by `perf.attempt`.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import msgspec

from inlaid.workload.spec import Workload
from perf.launch import READY_PATHS, ServerCommand
from perf.random_adapters import RandomAdapters

PORT = "$PORT"  # stands for the port in the commands written for people


class Instance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A point of a grid.

    `port` 0 is any free one; `num_hidden_layers` is what the template says the model has, checked before a start;
    `refused` are keys of the template that cannot be honoured, with the reason, `dropped` those it gave up; `missing`
    says which data file a dry run did not find.
    """

    point: str
    labels: dict[str, Any]
    server: ServerCommand
    workload: Workload
    client: dict[str, Any]
    port: int = 11236
    environment: dict[str, str] = {}
    random_adapters: RandomAdapters | None = None
    num_hidden_layers: int | None = None
    ready_timeout_s: float = 600.0
    point_timeout_s: float = 7200.0
    max_failed_share: float = 0.0
    refused: dict[str, str] = {}
    dropped: dict[str, str] = {}
    missing: str = ""

    def ready_url(self, port: int) -> str:
        return f"http://127.0.0.1:{port}{READY_PATHS[self.server.kind]}"

    def server_argv(self, port: int | str) -> list[str]:
        return self.server.argv(port)

    def client_argv(self, port: int | str, workload: Path, out: Path) -> list[str]:
        """Adapters go by name, in the order served, so that an index in the workload means the same one."""
        argv = [sys.executable, "-m", "perf.client", "--workload", str(workload), "--out", str(out)]
        argv += ["--base-url", f"http://127.0.0.1:{port}", "--label", self.point, "--no-progress"]
        argv += ["--max-failed-share", str(self.max_failed_share)]
        if self.server.kind == "slora":
            argv += ["--backend", "slora", "--model", self.server.model]
            argv += ["--adapters", *(path for _, path in self.server.adapters)]
        else:
            argv += ["--adapters", *(name for name, _ in self.server.adapters)]
        for key, value in self.client.items():
            flag = "--" + key.replace("_", "-")
            if value is not False:
                argv += [flag] if value is True else [flag, str(value)]
        return argv

    def write(self, directory: Path) -> None:
        """Write the config, the workload, and the two commands as scripts that can be run by hand."""
        encoded = msgspec.json.encode(self)
        (directory / "instance.json").write_bytes(msgspec.json.format(encoded, indent=2) + b"\n")
        workload = directory / "workload.json"
        workload.write_bytes(msgspec.json.format(msgspec.json.encode(self.workload), indent=2) + b"\n")
        self._script(directory / "launch_server.sh", self.server_argv(PORT))
        here = Path("$HERE")
        self._script(
            directory / "launch_client.sh", self.client_argv(PORT, here / workload.name, here / "by_hand.json")
        )

    def _script(self, path: Path, argv: list[str]) -> None:
        line = " \\\n    ".join(_quoted(part) for part in argv)
        exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in self.environment.items())
        port = self.port or 11236
        path.write_text(
            "#!/usr/bin/env bash\n"
            f"# {self.point}: run from the repository's root. The runner itself starts the same command.\n"
            f'set -euo pipefail\nHERE=$(dirname "${{BASH_SOURCE[0]}}")\nPORT=${{PORT:-{port}}}\n{exports}exec {line}\n'
        )
        path.chmod(0o755)


def _quoted(part: str) -> str:
    """Quotes for the shell, but lets the script's own two variables through."""
    if "$PORT" in part or part.startswith("$HERE"):
        return f'"{part}"'
    return shlex.quote(part)
