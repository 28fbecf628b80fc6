"""Limits on entering the queue: waiting requests and requests per minute. The scheduler asks at every arrival; a
refusal is immediate and says when to try again."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import msgspec

from inlaid.engine.account import Account
from inlaid.engine.refusal import Refusal, RefusalKind, Refused

MAX_RETRY_SECONDS = 600.0
MAX_LIMIT = 2**31 - 1
MAX_REMEMBERED = 10_000  # tenants whose acceptances are kept before those out of the window are forgotten


class TenantLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one tenant; None: only the general ones hold."""

    requests_per_minute: int | None = None
    max_waiting: int | None = None

    def check(self, tenant: str) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LIMIT:
                raise ValueError(
                    f"limit {name} of tenant {tenant!r} is {value}; it must be 0 or more, up to {MAX_LIMIT}"
                )


class QueueLimits:
    """Counts acceptances per tenant in a sliding window, and the pace at which the queue moves."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.tenants: dict[str, TenantLimits] = {}
        self._accepted: dict[str, deque[float]] = {}
        self._longest_window = 60.0
        self._interval = 0.0  # smoothed seconds between admissions while requests wait
        self._admitted_at: float | None = None

    def set_tenants(self, limits: Mapping[str, TenantLimits]) -> None:
        for tenant, limit in limits.items():
            limit.check(tenant)
        self.tenants = dict(limits)

    def check(self, account: Account, num_waiting: int, num_tenants: int, now: float) -> None:
        """Raise Refused unless a request of this tenant may wait. When the queue is full, a tenant that holds less
        than an equal share of it is still let in: a flood by one does not lock out the others."""
        limit = self.tenants.get(account.tenant, TenantLimits())
        if limit.max_waiting is not None and account.num_waiting >= limit.max_waiting:
            raise self._full(f"tenant {account.tenant!r} has {account.num_waiting} requests waiting", limit.max_waiting)
        share = self.max_waiting / max(1, num_tenants + (account.num_waiting == 0))
        if num_waiting >= self.max_waiting and account.num_waiting + 1 > share:
            raise self._full(f"{num_waiting} requests are waiting", num_waiting)
        if limit.requests_per_minute is not None:
            self.check_rate(account.tenant, limit.requests_per_minute, 60.0, now)

    def check_rate(self, tenant: str, limit: int, window: float, now: float) -> None:
        """Raise Refused if the tenant was let in `limit` times within the last `window` seconds."""
        self._longest_window = max(self._longest_window, window)
        times = self._accepted.get(tenant, deque())
        while times and times[0] <= now - window:
            times.popleft()
        if len(times) >= limit:
            wait = times[len(times) - limit] + window - now if limit else window
            message = f"tenant {tenant!r} may start {limit} requests per {window:g} s; try again in {wait:.0f} s"
            raise Refused(Refusal(message, RefusalKind.TOO_MANY, retry_after=wait))

    def note_accepted(self, tenant: str, now: float, limited: bool) -> None:
        """Record an accepted request for rate limiting."""
        if limited or tenant in self.tenants:
            if len(self._accepted) >= MAX_REMEMBERED:
                since = now - self._longest_window
                self._accepted = {name: times for name, times in self._accepted.items() if times and times[-1] > since}
            self._accepted.setdefault(tenant, deque()).append(now)

    def note_admitted(self, now: float, others_wait: bool) -> None:
        if self._admitted_at is not None and others_wait:
            self._interval += 0.05 * (now - self._admitted_at - self._interval)
        self._admitted_at = now

    def expected_wait(self, num_ahead: int) -> float:
        """Return the seconds until `num_ahead` requests have been admitted, at the present pace."""
        return num_ahead * self._interval

    def retry_after(self, num_ahead: int) -> float:
        """Return the seconds after which a client behind `num_ahead` requests should ask again."""
        return min(max(1.0, self.expected_wait(num_ahead)), MAX_RETRY_SECONDS)

    def _full(self, message: str, num_ahead: int) -> Refused:
        seconds = self.retry_after(num_ahead)
        message = f"{message}; try again in {seconds:.0f} s"
        return Refused(Refusal(message, RefusalKind.TOO_MANY, retry_after=seconds))
