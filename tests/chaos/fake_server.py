"""A server without a model, for kills by the hundred: `python -m tests.chaos.fake_server STATE ROOT` serves the fake
engine of `tests/worker` with the demo's tokenizer, prints its address, and keeps its state in a file.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from inlaid.config import EngineConfig, ServerConfig
from inlaid.server.serving import serve
from tests.server.live import ADMIN_KEY, DEMO
from tests.worker.fake_engine import ENVIRONMENT, FACTORY


def main() -> int:
    """Serve until killed."""
    config = ServerConfig(
        port=0,
        state=sys.argv[1],
        admin_key=ADMIN_KEY,
        allow_runtime_lora=True,
        lora_root=(sys.argv[2],),
        log_level="error",
    )
    options: dict[str, Any] = {"factory": FACTORY, "environment": ENVIRONMENT}
    engine = EngineConfig(model=str(DEMO / "base"))
    return asyncio.run(serve(config, engine, {}, lambda service, at: print(f"at:  {at}/v1 ", flush=True), **options))


if __name__ == "__main__":
    sys.exit(main())
