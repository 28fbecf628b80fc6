"""Which adapters the running batch uses, and which requests wait for theirs to be loaded. The scheduler is the only
caller; whether an adapter is on the device is the directory's to say."""

from __future__ import annotations

import math
from typing import Final

from inlaid.engine.refusal import Refusal, RefusalKind
from inlaid.engine.request import Request
from inlaid.engine.residency import AdapterDirectory

READY: Final = "ready"
LOADING: Final = "loading"


class Tasks:
    """Counts of running requests per adapter, and the parked ones."""

    def __init__(self, adapters: AdapterDirectory, max_sum_of_ranks: int, max_wait: float = math.inf) -> None:
        self.active: dict[str | None, int] = {}
        self.parked: dict[str, list[Request]] = {}
        self.num_parked = 0
        self.max_tasks = 0  # distinct adapters in a step; 0: no limit
        self._adapters = adapters
        self._max_sum_of_ranks = max_sum_of_ranks
        self._max_wait = max_wait  # seconds that a request may be parked, all in all
        self._sum_of_ranks = 0

    def enter(self, identity: str | None) -> bool:
        """One more running request has this adapter. True: it is the first."""
        count = self.active.get(identity, 0)
        self.active[identity] = count + 1
        if identity is not None:
            self._adapters.pin(identity)
            if count == 0:
                self._sum_of_ranks += self._adapters.rank(identity)
        return count == 0

    def leave(self, identity: str | None) -> None:
        """One running request less has it. The pin stays until no submitted step uses it, see the scheduler's limbo."""
        count = self.active.pop(identity) - 1
        if count:
            self.active[identity] = count
        elif identity is not None:
            self._sum_of_ranks -= self._adapters.rank(identity)

    @property
    def full(self) -> bool:
        """Whether no further task may enter the batch."""
        return bool(self.max_tasks) and len(self.active) - (None in self.active) >= self.max_tasks

    def has_room(self, identity: str | None) -> bool:
        """Whether the limits on tasks and ranks allow this adapter beside those in the batch. Alone, any is allowed."""
        if identity is None or identity in self.active or not self._sum_of_ranks:
            return True
        ranks = self._max_sum_of_ranks
        return not self.full and (not ranks or self._sum_of_ranks + self._adapters.rank(identity) <= ranks)

    def state(self, identity: str | None) -> str | Refusal:
        """READY, LOADING, or why it will not be on the device."""
        if identity is None or identity in self.active:
            return READY
        try:
            return READY if self._adapters.ready(identity) else LOADING
        except TimeoutError as error:
            return Refusal(str(error), RefusalKind.UNAVAILABLE)
        except RuntimeError as error:
            return Refusal(str(error) or "it cannot be loaded", RefusalKind.FAULT)

    def park(self, request: Request, now: float) -> None:
        assert request.adapter is not None
        request.parked_at = now if request.parked_at is None else request.parked_at
        self.parked.setdefault(request.adapter, []).append(request)
        self.num_parked += 1

    def remove(self, request: Request) -> bool:
        """Take out a request that has ended. False: it was not parked."""
        requests = self.parked.get(request.adapter or "", [])
        if request not in requests:
            return False
        requests.remove(request)
        self.num_parked -= 1
        if not requests:
            del self.parked[request.adapter or ""]
        return True

    def settled(self, now: float) -> list[tuple[Request, str | Refusal]]:
        """Take out those whose adapter has come, or can never come, or who have waited too long, with its state."""
        states = {identity: self.state(identity) for identity in self.parked}
        overdue = [request for request in self._overdue(now) if states[request.adapter or ""] == LOADING]
        out: list[tuple[Request, str | Refusal]] = [(request, self._too_long()) for request in overdue]
        for request, _ in out:
            self.remove(request)
        states = {identity: state for identity, state in states.items() if identity in self.parked}
        for identity, state in states.items():
            if state != LOADING:
                requests = self.parked.pop(identity)
                self.num_parked -= len(requests)
                out += [(request, state) for request in requests]
        return out

    def _overdue(self, now: float) -> list[Request]:
        everyone = (request for requests in self.parked.values() for request in requests)
        return [r for r in everyone if r.parked_at is not None and now - r.parked_at > self._max_wait]

    def _too_long(self) -> Refusal:
        return Refusal(
            f"it was not on the device within {self._max_wait:g} s: it is still loading, or every place is in use; ask "
            "again, or raise --adapter-timeout or --max-loras",
            RefusalKind.UNAVAILABLE,
        )

    def want(self, only: str | None) -> None:
        """Ask for the adapters that parked requests need, or for one of them alone."""
        for identity in self.parked if only is None else (only,):
            self._adapters.want(identity)
