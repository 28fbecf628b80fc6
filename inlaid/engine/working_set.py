"""The working set: which adapters the running batch uses, and which requests are set aside until theirs is loaded.

The scheduler is the only caller. Where an adapter is (device, host, disk) is the adapter directory's knowledge.
"""

from __future__ import annotations

import math
from typing import Final

from inlaid.engine.progress import Progress
from inlaid.engine.refusal import Refusal, RefusalKind
from inlaid.engine.residency import AdapterDirectory

READY: Final = "ready"
LOADING: Final = "loading"


class WorkingSet:
    """Counts of running requests per adapter, and the requests set aside."""

    def __init__(self, adapters: AdapterDirectory, max_sum_of_ranks: int, max_wait: float = math.inf) -> None:
        self.active: dict[str | None, int] = {}
        self.aside: dict[str, list[Progress]] = {}  # requests by the adapter that each waits for
        self.num_aside = 0
        self.max_adapters = 0  # distinct adapters in a step; 0: no limit
        self.beta = 0  # the policy's limit, which seniors are not held to; 0: none
        self._adapters = adapters
        self._max_sum_of_ranks = max_sum_of_ranks
        self._max_wait = max_wait  # seconds that a request may be set aside, all in all
        self._sum_of_ranks = 0

    def enter(self, identity: str | None) -> None:
        """Count one more running request with this adapter."""
        count = self.active.get(identity, 0)
        self.active[identity] = count + 1
        if identity is not None:
            self._adapters.pin(identity)
            if count == 0:
                self._sum_of_ranks += self._adapters.rank(identity)

    def leave(self, identity: str | None) -> None:
        """Count one running request less. The pin stays until no submitted step uses the adapter, see steps.py."""
        count = self.active.pop(identity) - 1
        if count:
            self.active[identity] = count
        elif identity is not None:
            self._sum_of_ranks -= self._adapters.rank(identity)

    @property
    def full(self) -> bool:
        """True if no further adapter may enter the batch."""
        return self._full(self.limit)

    @property
    def limit(self) -> int:
        """Most distinct adapters in a step; 0: no limit."""
        return min(self.beta or self.max_adapters, self.max_adapters or self.beta)

    def _full(self, limit: int) -> bool:
        return bool(limit) and len(self.active) - (None in self.active) >= limit

    def has_room(self, identity: str | None, senior: bool = False) -> bool:
        """Check the limits on adapters and ranks for this adapter beside those in the batch; alone, any may run."""
        if identity is None or identity in self.active or not self._sum_of_ranks:
            return True
        ranks = self._max_sum_of_ranks
        full = self._full(self.max_adapters if senior else self.limit)
        return not full and (not ranks or self._sum_of_ranks + self._adapters.rank(identity) <= ranks)

    def state(self, identity: str | None) -> str | Refusal:
        """Return READY, LOADING, or why the adapter will not be on the device."""
        if identity is None or identity in self.active:
            return READY
        try:
            return READY if self._adapters.ready(identity) else LOADING
        except TimeoutError as error:
            return Refusal(str(error), RefusalKind.UNAVAILABLE)
        except RuntimeError as error:
            return Refusal(str(error) or "it cannot be loaded", RefusalKind.FAULT)

    def set_aside(self, progress: Progress, now: float) -> None:
        """Let a request wait for its adapter outside the queue."""
        identity = progress.request.adapter
        assert identity is not None
        progress.aside_since = now if progress.aside_since is None else progress.aside_since
        self.aside.setdefault(identity, []).append(progress)
        self.num_aside += 1

    def is_aside(self, progress: Progress) -> bool:
        return progress in self.aside.get(progress.request.adapter or "", ())

    def remove(self, progress: Progress) -> bool:
        """Take out a request that has ended; return False if it was not set aside."""
        identity = progress.request.adapter or ""
        waiting = self.aside.get(identity, [])
        if progress not in waiting:
            return False
        waiting.remove(progress)
        self.num_aside -= 1
        if not waiting:
            del self.aside[identity]
        return True

    def take_settled(self, now: float) -> list[tuple[Progress, str | Refusal]]:
        """Take out, with its adapter's state, each request whose adapter has come or never can, or whose time is up."""
        states = {identity: self.state(identity) for identity in self.aside}
        overdue = [progress for progress in self._overdue(now) if states[progress.request.adapter or ""] == LOADING]
        out: list[tuple[Progress, str | Refusal]] = [(progress, self._too_late()) for progress in overdue]
        for progress, _ in out:
            self.remove(progress)
        states = {identity: state for identity, state in states.items() if identity in self.aside}
        for identity, state in states.items():
            if state != LOADING:
                waiting = self.aside.pop(identity)
                self.num_aside -= len(waiting)
                out += [(progress, state) for progress in waiting]
        return out

    def _overdue(self, now: float) -> list[Progress]:
        everyone = (progress for waiting in self.aside.values() for progress in waiting)
        return [p for p in everyone if p.aside_since is not None and now - p.aside_since > self._max_wait]

    def _too_late(self) -> Refusal:
        return Refusal(
            f"it was not on the device within {self._max_wait:g} s: it is still loading, or every place is in use; ask "
            "again, or raise --adapter-timeout or --max-loras",
            RefusalKind.UNAVAILABLE,
        )

    def want(self, only: str | None) -> None:
        """Ask for the adapters that requests set aside need, or for one of them alone."""
        for identity in self.aside if only is None else (only,):
            self._adapters.want(identity)
