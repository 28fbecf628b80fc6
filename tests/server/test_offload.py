"""Short work is done at once, long work on a thread."""

from __future__ import annotations

import asyncio
import threading

from inlaid.server.offload import Offload


def test_only_long_work_leaves_the_event_loop() -> None:
    async def main() -> None:
        offload = Offload()
        here = threading.get_ident()
        assert await offload.run(100, threading.get_ident) == here
        assert await offload.run(100_000, threading.get_ident) != here
        assert await offload.run(100_000, int, "11", base=2) == 3

    asyncio.run(main())
