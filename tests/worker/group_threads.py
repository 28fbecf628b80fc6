"""Members of a tensor-parallel group as threads of the test's process: all of a group but its processes."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from inlaid.worker.member import Member


class MemberThread:
    """A member that runs on a thread, and ends when its socket is shut."""

    def __init__(
        self, index: int, count: int, connection: socket.socket, steps: int, sums: int, on_end: Callable[[], None]
    ) -> None:
        self.ended: str | None = None
        self._index, self._socket, self._on_end = index, connection, on_end
        memory = [mmap.mmap(each, os.fstat(each).st_size) for each in (steps, sums)]
        self.member = Member(connection, *memory)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.member.run()
        finally:
            self._socket.close()
            self.ended = f"member {self._index} of the group has ended"
            self._on_end()

    def kill(self) -> None:
        if self.ended is None:
            self._socket.shutdown(socket.SHUT_RDWR)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)


def members_of(loaded: Any) -> list[Member]:
    """Return the members of a loaded model's group, which are threads."""
    return [each.member for each in loaded.lead._members]
