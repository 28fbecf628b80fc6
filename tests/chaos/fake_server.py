"""Servers without a model, for kills and requests by the thousand: each serves the fake engine of `tests/worker` with
the demo's tokenizer and keeps its state in a file. `python -m tests.chaos.fake_server` is a nursery: it imports what a
server needs, forks one for each line `STATE<tab>ROOT` of its input, and prints the server's process and address.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec

from inlaid.config import EngineConfig, ServerConfig
from inlaid.server.serving import serve
from inlaid.worker.build import Loaded
from tests.server.live import ADMIN_KEY, DEMO, ROOT, Live
from tests.worker import fake_engine

_VOCABULARY = 1024  # of the demo's tokenizer


def build(config: EngineConfig, adapters: Mapping[str, str], *, strict: bool = True) -> Loaded:
    """Make the fake engine, let it take every token of the demo, and let no constraint wait to be compiled."""
    loaded = fake_engine.build(config, adapters, strict=strict)
    loaded.compile_grammar = None
    loaded.model = msgspec.structs.replace(loaded.model, vocab_size=_VOCABULARY)
    return loaded


class Nursery:
    """A process that forks servers: the third of the time of one that starts anew goes into imports."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.chaos.fake_server"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def started(self, state: Path, root: Path) -> Live:
        """Start a server; whoever calls this ends it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{state}\t{root}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the server did not come up"
        pid, url = line.split()
        return Live(cast(Any, Forked(int(pid))), url)

    def close(self) -> None:
        """End the nursery; its servers are ended one by one before."""
        self._process.communicate()


class Forked:
    """A server of the nursery, with as much of `subprocess.Popen` as tests of servers use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Return a number if the server has ended, whatever its status was."""
        return -1 if select.select([self._descriptor], [], [], 0)[0] else None

    def wait(self) -> None:
        """Wait for the server's end."""
        select.select([self._descriptor], [], [])

    def end(self) -> None:
        """Kill the server if it has not ended, and forget it."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
            self.wait()
        os.close(self._descriptor)


def ended(server: Live) -> None:
    """Kill the server and wait for its end."""
    cast(Forked, server.process).end()


def serve_forever(state: str, root: str) -> int:
    """Serve until killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the server looks how its engine has ended
    config = ServerConfig(
        port=0,
        state=state,
        admin_key=ADMIN_KEY,
        allow_runtime_lora=True,
        lora_root=(root,),
        log_level="error",
        max_prompts=8,
        body_timeout=5.0,
    )
    options: dict[str, Any] = {"factory": "tests.chaos.fake_server:build", "environment": fake_engine.ENVIRONMENT}
    engine = EngineConfig(model=str(DEMO / "base"))
    return asyncio.run(serve(config, engine, {}, lambda service, at: print(os.getpid(), at, flush=True), **options))


def main() -> int:
    """Fork a server for each line of the input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the servers
    for line in sys.stdin:
        if os.fork() == 0:
            os.close(sys.stdin.fileno())
            os._exit(serve_forever(*line.rstrip("\n").split("\t")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
