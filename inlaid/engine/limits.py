"""Limits on entering the queue: waiting requests and requests per minute. The scheduler asks at every arrival; a
refusal is immediate and says when to try again. The server remembers acceptances too, so that a new engine process
knows those of the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

from inlaid.engine.account import Account
from inlaid.engine.refusal import Refusal, RefusalKind, Refused

MAX_RETRY_SECONDS = 600.0
MAX_LIMIT = 2**31 - 1
_MINUTE = 60.0
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


class Acceptances:
    """Times at which each tenant's requests were accepted, as far back as the longest window that is asked about."""

    def __init__(self) -> None:
        self._times: dict[str, deque[float]] = {}
        self.longest_window = _MINUTE

    def note(self, tenant: str, now: float, window: float) -> None:
        """Record an accepted request of a tenant whose requests are counted in windows of so many seconds."""
        self.longest_window = max(self.longest_window, window)
        since = now - self.longest_window
        if len(self._times) >= MAX_REMEMBERED and tenant not in self._times:
            self._times = self.since(since)
        times = self._times.setdefault(tenant, deque())
        times.append(now)
        while times[0] <= since:
            times.popleft()

    def wait(self, tenant: str, limit: int, window: float, now: float) -> float:
        """Return the seconds until the tenant has fewer than `limit` acceptances within the last `window` seconds."""
        self.longest_window = max(self.longest_window, window)
        if limit == 0:
            return window
        times = self._times.get(tenant, ())
        return max(0.0, times[-limit] + window - now) if len(times) >= limit else 0.0

    def since(self, when: float) -> dict[str, deque[float]]:
        """Return the acceptances of all tenants with one after `when`."""
        return {tenant: times for tenant, times in self._times.items() if times[-1] > when}

    def export(self, now: float) -> dict[str, list[float]]:
        """Return the acceptances that still count."""
        return {tenant: list(times) for tenant, times in self.since(now - self.longest_window).items()}

    def restore(self, exported: Mapping[str, Sequence[float]], window: float) -> None:
        """Take over what `export` returned in another process on this machine."""
        for tenant, times in exported.items():
            for when in times:
                self.note(tenant, when, window)


class QueueLimits:
    """Counts acceptances per tenant in a sliding window, and the pace at which the queue moves."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.tenants: dict[str, TenantLimits] = {}
        self.accepted = Acceptances()
        self.on_accepted: Callable[[str, float, float], None] = lambda tenant, when, window: None
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
            self.check_rate(account.tenant, limit.requests_per_minute, _MINUTE, now)

    def check_rate(self, tenant: str, limit: int, window: float, now: float) -> None:
        """Raise Refused if the tenant was let in `limit` times within the last `window` seconds."""
        wait = self.accepted.wait(tenant, limit, window, now)
        if wait > 0:
            message = f"tenant {tenant!r} may start {limit} requests per {window:g} s; try again in {wait:.0f} s"
            raise Refused(Refusal(message, RefusalKind.TOO_MANY, retry_after=wait))

    def note_accepted(self, tenant: str, now: float, window: float | None) -> None:
        """Record an accepted request for rate limiting; `window` is the policy's, None where it has none."""
        limit = self.tenants.get(tenant)
        if window is None and limit is not None and limit.requests_per_minute is not None:
            window = _MINUTE
        if window is not None:
            self.accepted.note(tenant, now, window)
            self.on_accepted(tenant, now, window)

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
