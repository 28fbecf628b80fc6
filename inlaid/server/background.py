"""Tasks that run as long as the server does. One that fails is logged, started again after a pause and counted, so that
/health can show it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

_SHORTEST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds before a task that has failed is started again

Run = Callable[[], Awaitable[object]]


class Background:
    """The server's background tasks."""

    def __init__(self, pause: float = _SHORTEST_PAUSE) -> None:
        self._pause = pause
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._num_failures: dict[str, int] = {}

    def start(self, name: str, run: Run) -> None:
        """Run a task until `close`. It is not expected to end by itself."""
        self._num_failures[name] = 0
        self._tasks[name] = asyncio.create_task(self._keep(name, run), name=name)

    @property
    def states(self) -> dict[str, str]:
        """Each task's state: running, or how often it has failed."""
        return {name: f"failed {count} times" if count else "running" for name, count in self._num_failures.items()}

    async def close(self) -> None:
        """End all tasks."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _keep(self, name: str, run: Run) -> None:
        pause = self._pause
        while True:
            try:
                await run()
                reason = "it ended"
            except Exception as error:
                log.error("%s failed", name, exc_info=error)
                reason = "it failed"
            self._num_failures[name] += 1
            log.warning("%s is started again in %g s: %s", name, pause, reason)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
