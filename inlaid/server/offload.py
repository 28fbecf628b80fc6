"""Work away from the event loop: on long bodies and texts, and on what many ask for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

_SHORT = 8192  # bytes or characters; work on less is done at once
_THREADS = 2  # more would compete with the event loop for the interpreter's lock

_Made = TypeVar("_Made")


class Offload:
    """Does short work at once and long work on a few threads, so that no request holds up the tokens of another. What
    runs there is Python, which lets other threads in every few milliseconds, or releases the interpreter's lock."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, "long-text")
        self._chats = ThreadPoolExecutor(1, "short-chat")

    async def run(self, size: int, work: Callable[..., _Made], *arguments: Any, **more: Any) -> _Made:
        """Do work on something of this size."""
        if size <= _SHORT:
            return work(*arguments, **more)
        return await self.run_on_thread(partial(work, *arguments, **more))

    async def run_chat(self, size: int, work: Callable[..., _Made], *arguments: Any, **more: Any) -> _Made:
        """Do work on a conversation of this size. It waits for the process of the chat template, so it is never done at
        once; short ones do not wait behind long ones."""
        threads = self._chats if size <= _SHORT else self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, partial(work, *arguments, **more))

    async def run_on_thread(self, work: Callable[[], _Made]) -> _Made:
        """Do work that is long whatever it is about."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


class Shared(Generic[_Made]):
    """A value that is made at most once in a while, however many ask for it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._made: tuple[float, _Made] | None = None
        self._making = asyncio.Lock()

    async def get(self, make: Callable[[], Awaitable[_Made]]) -> _Made:
        """Return the value, made anew if it is too old."""
        async with self._making:
            if self._made is None or self._clock() - self._made[0] >= self._seconds:
                value = await make()
                self._made = (self._clock(), value)
            return self._made[1]
