"""The requests that wait, in the order of a policy. The scheduler is the only caller.

Two levels, so that an order that changes with every token served (per-tenant counters) costs nothing per token:
requests wait in groups (one per tenant, adapter, ... as the policy says) ordered by a rank that does not change while
they wait, and groups are ordered by a key that may. A key that rose is noticed when its group comes to the front; one
that fell must be announced with `touch`.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Iterator

from inlaid.engine.policy import Policy, Rank, View
from inlaid.engine.request import Request, Status

Entry = tuple[Rank, int, Request]


class _Group:
    __slots__ = ("entries", "name", "version")

    def __init__(self, name: Hashable) -> None:
        self.name = name
        self.entries: list[Entry] = []
        self.version = 0


class WaitingQueue:
    """A priority queue of requests. Removal is lazy: a request that no longer waits is skipped when met."""

    def __init__(self, policy: Policy, view: View) -> None:
        self.policy = policy
        self._view = view
        self._groups: dict[Hashable, _Group] = {}
        self._front: list[tuple[Rank, int, int, _Group]] = []
        self._length = 0
        self._num_dead = 0
        self._num_placed = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """Iterate over the requests that wait, in no particular order."""
        for group in self._groups.values():
            for _, _, request in group.entries:
                if request.status is Status.WAITING:
                    yield request

    def push(self, request: Request) -> None:
        name = self.policy.group(request)
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(name)
        heapq.heappush(group.entries, (self.policy.rank(request, self._view), request.order, request))
        self._length += 1
        if group.entries[0][2] is request:
            self._place(group)

    def pop(self) -> Request | None:
        """Take out the first."""
        group = self._first_group()
        return None if group is None else self._take(group)

    def peek(self) -> Request | None:
        """Return the first and leave it where it is."""
        group = self._first_group()
        return None if group is None else group.entries[0][2]

    def pop_among(self, names: Iterable[Hashable]) -> Request | None:
        """Take out the first request of these few groups."""
        groups = [group for name in names if (group := self._groups.get(name)) is not None]
        for group in groups:
            self._drop_dead(group)
        alive = [group for group in groups if group.entries]
        return self._take(min(alive, key=self._key)) if alive else None

    def _first_group(self) -> _Group | None:
        while self._front:
            key, _, version, group = self._front[0]
            if version != group.version:
                heapq.heappop(self._front)
                continue
            self._drop_dead(group)
            if not group.entries:
                heapq.heappop(self._front)
                del self._groups[group.name]
                continue
            current, order = self._key(group)
            if key >= current:
                return group
            heapq.heapreplace(self._front, (current, order, version, group))
        return None

    def _key(self, group: _Group) -> tuple[Rank, int]:
        rank, order, _ = group.entries[0]
        return self.policy.key(group.name, rank, self._view), order

    def _take(self, group: _Group) -> Request:
        """Take the head of a group. The group's place in the heap is stale now, which _first_group will notice."""
        self._length -= 1
        return heapq.heappop(group.entries)[2]

    def discard(self, request: Request) -> None:
        """Count out a request that was in the queue and has just stopped waiting, as its status says."""
        self._length -= 1
        self._num_dead += 1
        if self._num_dead > 64 + self._length:
            self.reorder(self.policy)

    def touch(self, name: Hashable) -> None:
        """Place a group anew, as its key may have fallen."""
        group = self._groups.get(name)
        if group is not None and group.entries:
            self._place(group)

    def reorder(self, policy: Policy) -> None:
        """Build the queue anew, in the order of this policy."""
        requests = list(self)
        self.policy = policy
        self._groups, self._front, self._length, self._num_dead = {}, [], 0, 0
        for request in requests:
            self.push(request)

    def _place(self, group: _Group) -> None:
        self._num_placed += 1  # unique among all groups, also those of the same name before: no tie in the heap
        group.version = self._num_placed
        key, order = self._key(group)
        heapq.heappush(self._front, (key, order, group.version, group))

    def _drop_dead(self, group: _Group) -> None:
        while group.entries and group.entries[0][2].status is not Status.WAITING:
            heapq.heappop(group.entries)
            self._num_dead -= 1
