"""Work that must not hold up the step loop, on threads; what follows from it is done on the loop's own thread."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

NUM_COMPILERS = 2

Work = Callable[[], object]
Then = Callable[[Future[Any]], None]


class Threads:
    """A thread that reads adapters, one for adapters that take long to read, two that compile grammars, and one that
    stages another base. `woken` becomes readable when something is done."""

    def __init__(self) -> None:
        self._readers = ThreadPoolExecutor(1, "adapter-reader")
        self._slow_readers = ThreadPoolExecutor(1, "slow-adapter-reader")
        self._compilers = ThreadPoolExecutor(NUM_COMPILERS, "grammar-compiler")
        self._stager = ThreadPoolExecutor(1, "base-stager")
        self._done: deque[Callable[[], None]] = deque()
        self.woken, self._wake = os.pipe()
        os.set_blocking(self.woken, False)

    def read(self, work: Work, then: Then) -> None:
        """Read an adapter, then do something with it on the loop's thread."""
        self._submit(self._readers, work, then)

    def read_slowly(self, work: Work, then: Then) -> None:
        """Read an adapter that takes long, and let others pass."""
        self._submit(self._slow_readers, work, then)

    def compile(self, work: Work, then: Then) -> None:
        """Compile a grammar, then do something with it on the loop's thread."""
        self._submit(self._compilers, work, then)

    def stage(self, work: Work, then: Then) -> None:
        """Bring another base into memory, then do something with it on the loop's thread."""
        self._submit(self._stager, work, then)

    def wake(self) -> None:
        """Wake the loop, from any thread."""
        os.write(self._wake, b"!")

    def finish(self) -> None:
        """Do what follows from finished work; the loop calls this when `woken` is readable."""
        os.read(self.woken, 4096)
        while self._done:
            self._done.popleft()()

    def _submit(self, pool: ThreadPoolExecutor, work: Work, then: Then) -> None:
        def wake(future: Future[Any]) -> None:
            self._done.append(partial(then, future))
            self.wake()

        pool.submit(work).add_done_callback(wake)
