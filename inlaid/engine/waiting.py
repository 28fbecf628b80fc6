"""The requests that wait, in the order of a policy. The scheduler is the only caller.

Two levels, so that an order that changes with every token served (per-tenant counters) costs nothing per token:
requests wait in groups (one per tenant, adapter, ... as the policy says) ordered by a rank that does not change while
they wait, and groups are ordered by a key that may. A key that rose is noticed when its group comes to the front; one
that fell must be announced with `touch`.

Requests of some tenants can be left out of a look. Such a tenant's requests move to groups of their own, one by one as
they come to the front, so that leaving out a tenant with thousands of requests costs nothing per look. Groups of one
name have the same key for the same rank, so this changes no order.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Hashable, Iterable, Iterator

from inlaid.engine.policy import Policy, Rank, View
from inlaid.engine.request import Request, Status

Entry = tuple[Rank, int, Request]


MAX_APART = 64  # tenants with groups of their own, before all come together again


class _Group:
    __slots__ = ("entries", "name", "tenant", "version")

    def __init__(self, name: Hashable, tenant: str | None) -> None:
        self.name = name
        self.tenant = tenant  # whose requests alone it holds; None: of all that are not apart
        self.entries: list[Entry] = []
        self.version = 0


class WaitingQueue:
    """A priority queue of requests. Removal is lazy: an entry whose request waits there no more is skipped when met."""

    def __init__(self, policy: Policy, view: View) -> None:
        self.policy = policy
        self._view = view
        self._groups: dict[Hashable, _Group] = {}
        self._apart: set[str] = set()  # tenants with groups of their own, which are:
        self._own: dict[tuple[Hashable, str], _Group] = {}
        self._front: list[tuple[Rank, int, int, _Group]] = []
        self._length = 0
        self._num_dead = 0
        self._num_placed = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """Iterate over the requests that wait, in no particular order."""
        for group in (*self._groups.values(), *self._own.values()):
            for _, _, request in group.entries:
                if self._is_alive(request, group):
                    yield request

    def push(self, request: Request) -> None:
        """Add a request."""
        self._insert((self.policy.rank(request, self._view), request.order, request), self.policy.group(request))
        self._length += 1

    def promote(self, requests: Iterable[Request]) -> None:
        """Move requests that are in the queue to other groups: they have become senior, all of these before."""
        for request in requests:
            self.push(request)
            self._count_dead()  # its entry in the group that it has left
        self._drop_dead()

    def _is_alive(self, request: Request, group: _Group) -> bool:
        """Return False for an entry whose request has stopped waiting or has moved to another group."""
        return request.status is Status.WAITING and self.policy.group(request) == group.name

    def _insert(self, entry: Entry, name: Hashable) -> None:
        if self._apart and (tenant := entry[2].tenant) in self._apart:
            group = self._own.get((name, tenant))
            if group is None:
                group = self._own[name, tenant] = _Group(name, tenant)
        else:
            group = self._groups.get(name)
            if group is None:
                group = self._groups[name] = _Group(name, None)
        heapq.heappush(group.entries, entry)
        if group.entries[0] is entry:
            self._place(group)

    def pop(self, without: Collection[str] = ()) -> Request | None:
        """Take out the first request, leaving out those of some tenants."""
        group = self._first_group(without) if without else self._front_group()
        return None if group is None else self._take(group)

    def peek(self, without: Collection[str] = ()) -> Request | None:
        """Return the first request, leaving out those of some tenants, and leave it where it is."""
        group = self._first_group(without) if without else self._front_group()
        return None if group is None else group.entries[0][2]

    def pop_among(self, names: Collection[Hashable], without: Collection[str] = ()) -> Request | None:
        """Take out the first request of these few groups, leaving out those of some tenants."""
        self._set_apart(without)
        groups = [group for name in names if (group := self._groups.get(name)) is not None]
        for group in groups:
            self._clean(group)
        if self._apart:
            groups += self._own_of(names)
        alive = [group for group in groups if group.entries and group.tenant not in without]
        return self._take(min(alive, key=self._key)) if alive else None

    def _own_of(self, names: Collection[Hashable]) -> list[_Group]:
        """Return the clean groups of these names that hold the requests of one tenant."""
        keys = [(name, tenant) for name in names for tenant in self._apart]
        groups = [group for key in keys if (group := self._own.get(key)) is not None]
        for group in groups:
            self._clean(group)
        return groups

    def _set_apart(self, tenants: Collection[str]) -> None:
        """Give tenants groups of their own; their requests move there as they come to the front."""
        if not self._apart.issuperset(tenants):
            if len(self._apart) > MAX_APART:
                self._apart.clear()
                self.reorder(self.policy)
            self._apart.update(tenants)

    def _first_group(self, without: Collection[str]) -> _Group | None:
        self._set_apart(without)
        left_out: list[tuple[Rank, int, int, _Group]] = []
        group = self._front_group()
        while group is not None and group.tenant in without:
            left_out.append(heapq.heappop(self._front))
            group = self._front_group()
        for entry in left_out:
            heapq.heappush(self._front, entry)
        return group

    def _front_group(self) -> _Group | None:
        """Return the group at the front of the heap, once its key there is current."""
        while self._front:
            key, order, version, group = self._front[0]
            if version != group.version:
                heapq.heappop(self._front)
                continue
            self._clean(group)
            if self._front[0][3] is not group:
                continue  # what was moved apart came to the front
            if not group.entries:
                heapq.heappop(self._front)
                if group.tenant is None:
                    del self._groups[group.name]
                else:
                    del self._own[group.name, group.tenant]
                continue
            current = self._key(group)
            if (key, order) >= current:
                return group
            heapq.heapreplace(self._front, (*current, version, group))
        return None

    def _key(self, group: _Group) -> tuple[Rank, int]:
        rank, order, _ = group.entries[0]
        return self.policy.key(group.name, rank, self._view), order

    def _take(self, group: _Group) -> Request:
        """Take the head of a group. The group's place in the heap is stale now, which _front_group will notice."""
        self._length -= 1
        return heapq.heappop(group.entries)[2]

    def discard(self, request: Request) -> None:
        """Count out a request that was in the queue and has just stopped waiting, as its status says."""
        self._count_dead()
        self._drop_dead()

    def _count_dead(self) -> None:
        self._length -= 1
        self._num_dead += 1

    def _drop_dead(self) -> None:
        """Build the queue anew when most of its entries are dead. No request may be between two groups then."""
        if self._num_dead > 64 + self._length:
            self.reorder(self.policy)

    def touch(self, name: Hashable) -> None:
        """Place the groups of this name anew, as their key may have fallen."""
        group = self._groups.get(name)
        if group is not None and group.entries:
            self._place(group)
        for own in self._own_of((name,)) if self._apart else ():
            if own.entries:
                self._place(own)

    def reorder(self, policy: Policy) -> None:
        """Build the queue anew, in the order of this policy."""
        requests = list(self)
        self.policy = policy
        self._groups, self._own, self._front, self._length, self._num_dead = {}, {}, [], 0, 0
        for request in requests:
            self.push(request)

    def _place(self, group: _Group) -> None:
        self._num_placed += 1  # unique among all groups, also those of the same name before: no tie in the heap
        group.version = self._num_placed
        key, order = self._key(group)
        heapq.heappush(self._front, (key, order, group.version, group))

    def _clean(self, group: _Group) -> None:
        """Drop requests that no longer wait from the head of a group, and move those of tenants that are apart."""
        while group.entries:
            request = group.entries[0][2]
            if not self._is_alive(request, group):
                heapq.heappop(group.entries)
                self._num_dead -= 1
            elif self._apart and group.tenant is None and request.tenant in self._apart:
                self._insert(heapq.heappop(group.entries), group.name)
            else:
                return
