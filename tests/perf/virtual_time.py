"""An event loop whose clock moves only when nothing is left to do, over real sockets.

A server and a client that share it see exact times, however busy the machine is.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
LOOPBACK_S = 0.005  # real seconds in which bytes on the loopback may still be on their way


class _Selector(selectors.DefaultSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        ready = super().select(LOOPBACK_S if timeout is not None else None)
        if not ready and timeout is not None:
            self.loop.now += max(timeout, 0.0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 1000.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run_virtual(job: Coroutine[Any, Any, T]) -> T:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(job)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
