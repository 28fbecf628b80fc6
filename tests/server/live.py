"""A live server for tests: `inlaid serve` as a user starts it, on a free port of this machine."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests import fork_server
from tests.fork_server import ENGINE, Fork

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "demo"
ADMIN_KEY = "admin-secret"
LIMITS = ["--max-model-len", "1024", "--num-blocks", "400", "--metrics-interval", "0"]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Live:
    """A running server."""

    process: subprocess.Popen[str] | Fork
    url: str
    log: list[str] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname
        assert parts.port
        return parts.hostname, parts.port

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            data = raw if raw is not None else None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def admin(self, method: str, path: str, body: Any = None) -> Answer:
        return self.ask(method, path, body, {"Authorization": f"Bearer {ADMIN_KEY}"})

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        page = self.ask("GET", "/metrics").body.decode()
        values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", page, re.M)
        return sum(map(float, values))

    def until_metric(self, name: str, wanted: float) -> None:
        """Ask until it is so; the test's own timeout ends what never comes true."""
        while self.metric(name) != wanted:
            time.sleep(0.05)

    def children(self) -> list[int]:
        """Return the engine processes that the server has started."""
        found = []
        for number in map(int, Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()):
            with suppress(OSError):  # it has ended meanwhile
                anew = b"inlaid.worker.process" in Path(f"/proc/{number}/cmdline").read_bytes()
                if anew or Path(f"/proc/{number}/comm").read_text().strip() == ENGINE:
                    found.append(number)
        return found


@contextmanager
def serving(
    *arguments: str,
    command: str = "serve",
    environment: dict[str, str] | None = None,
    max_descriptors: int | None = None,
    forked: bool = True,
    engines: int = 1,
) -> Iterator[Live]:
    """Run a server with these flags; it is stopped at the end, however the test went.

    With `forked`, it and its first engines are forks that import nothing (`tests/fork_server.py`), unless it has an
    environment or a limit of its own."""
    ours = [sys.executable, "-m", "inlaid", command, "--port", "0", *LIMITS, *arguments]
    given: Any = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}}
    given |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process: subprocess.Popen[str] | Fork
    if forked and environment is None and max_descriptors is None:
        process = fork_server.popen(ours, **given, engines=engines)
    else:
        limit = () if max_descriptors is None else ("bash", "-c", f'ulimit -n {max_descriptors}; exec "$@"', "bash")
        process = subprocess.Popen([*limit, *ours], **given)
    live = Live(process, "")
    try:
        assert process.stdout is not None
        for line in process.stdout:
            live.log.append(line)
            if found := re.search(r"at:\s+(http://\S+)/v1 ", line):
                live.url = found.group(1)
                break
        assert live.url, "the server did not come up:\n" + "".join(live.log)
        reader = threading.Thread(target=live.log.extend, args=(process.stdout,))
        reader.start()
        yield live
    finally:
        process.kill()
        process.wait()
        if live.url:
            reader.join()  # the engine process has the pipe too, and ends with the server
        if process.stdout is not None:
            process.stdout.close()
