"""A server without a model, for kills and requests by the thousand: `python -m tests.chaos.fake_server STATE ROOT`
serves the fake engine of `tests/worker` with the demo's tokenizer, prints its address, and keeps its state in a file.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def started(state: Path, root: Path) -> Live:
    """Start the server; whoever calls this kills it."""
    command = [sys.executable, "-m", "tests.chaos.fake_server", str(state), str(root)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"at:  (http://\S+)/v1 ", line)
    assert found, f"the server did not come up: {line}"
    return Live(process, found.group(1))


def ended(server: Live) -> None:
    """Kill the server and wait for its end."""
    server.process.kill()
    server.process.wait()
    assert server.process.stdout is not None
    server.process.stdout.close()


def main() -> int:
    """Serve until killed."""
    config = ServerConfig(
        port=0,
        state=sys.argv[1],
        admin_key=ADMIN_KEY,
        allow_runtime_lora=True,
        lora_root=(sys.argv[2],),
        log_level="error",
        max_prompts=8,
        body_timeout=5.0,
    )
    options: dict[str, Any] = {"factory": "tests.chaos.fake_server:build", "environment": fake_engine.ENVIRONMENT}
    engine = EngineConfig(model=str(DEMO / "base"))
    return asyncio.run(serve(config, engine, {}, lambda service, at: print(f"at:  {at}/v1 ", flush=True), **options))


if __name__ == "__main__":
    sys.exit(main())
