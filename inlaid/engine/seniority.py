"""Seniority: which waiting requests have waited so long that no later one may overtake them. The scheduler is the only
caller; how long that is, the policy says (`seniority_s`)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from inlaid.engine.request import Request, Status

MIN_LOOKED_THROUGH = 256  # entries, before those of requests that no longer wait are dropped


class Seniority:
    """The requests that wait and are not senior yet, oldest first. An entry whose request no longer waits is dropped
    when it is met, or when there are too many."""

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        self._entries: list[tuple[float, int, Request]] = []
        self._most = MIN_LOOKED_THROUGH
        for request in requests:
            self.watch(request)

    def __len__(self) -> int:
        return len(self._entries)

    def watch(self, request: Request) -> None:
        """Add a request that waits, unless it is senior. One may be added again, after a preemption."""
        if request.senior or request.status is not Status.WAITING:
            return
        heapq.heappush(self._entries, (request.arrival, request.order, request))
        if len(self._entries) > self._most:
            self._entries = sorted({entry for entry in self._entries if _is_junior(entry[2])})
            self._most = max(MIN_LOOKED_THROUGH, 2 * len(self._entries))

    def promote(self, arrival: float) -> list[Request]:
        """Make senior, and take out, the requests that came at this time or before."""
        taken: list[Request] = []
        while self._entries and (self._entries[0][0] <= arrival or not _is_junior(self._entries[0][2])):
            request = heapq.heappop(self._entries)[2]
            if _is_junior(request):
                request.senior = True
                taken.append(request)
        return taken


def _is_junior(request: Request) -> bool:
    return request.status is Status.WAITING and not request.senior
