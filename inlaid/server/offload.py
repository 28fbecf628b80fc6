"""Work on long bodies and texts, away from the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

_SHORT = 8192  # bytes or characters; work on less is done at once
_THREADS = 2  # more would compete with the event loop for the interpreter's lock

_Made = TypeVar("_Made")


class Offload:
    """Does short work at once and long work on a few threads, so that no request holds up the tokens of another. What
    runs there is Python, which lets other threads in every few milliseconds, or releases the interpreter's lock."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, "long-text")

    async def run(self, size: int, work: Callable[..., _Made], *arguments: Any, **more: Any) -> _Made:
        """Do work on something of this size."""
        if size <= _SHORT:
            return work(*arguments, **more)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(work, *arguments, **more))
