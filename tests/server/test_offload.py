"""Short work is done at once, long work on a thread, and shared work once in a while."""

from __future__ import annotations

import asyncio
import threading

from inlaid.server.offload import Offload, Shared


def test_only_long_work_leaves_the_event_loop() -> None:
    async def main() -> None:
        offload = Offload()
        here = threading.get_ident()
        assert await offload.run(100, threading.get_ident) == here
        assert await offload.run(100_000, threading.get_ident) != here
        assert await offload.run(100_000, int, "11", base=2) == 3

    asyncio.run(main())


def test_a_shared_value_is_made_once_in_a_while() -> None:
    async def main() -> None:
        now, made = 0.0, 0
        shared: Shared[int] = Shared(1.0, lambda: now)

        async def make() -> int:
            nonlocal made
            made += 1
            await asyncio.sleep(0)
            return made

        assert await asyncio.gather(*(shared.get(make) for _ in range(5))) == [1] * 5
        now = 0.9
        assert await shared.get(make) == 1
        now = 1.0
        assert await shared.get(make) == 2

    asyncio.run(main())
