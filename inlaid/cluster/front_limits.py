"""FrontLimits: limits of tenants counted over all replicas, where the requests pass: at the front. The engines' own
counts of the same limits are never above these, so they refuse nothing that the front lets pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from inlaid.engine.account import Account
from inlaid.engine.limits import QueueLimits, TenantLimits
from inlaid.engine.policy import Rpm, make_policy, parse_policy

_NO_BOUND = 2**31 - 1  # the length of the queue is each engine's own limit


class FrontLimits:
    """Requests that wait, by tenant, and acceptances of those with a rate."""

    def __init__(self, policy: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = QueueLimits(_NO_BOUND)
        self._waiting: dict[str, Account] = {}
        self._clock = clock
        named = parse_policy(policy)
        self._rpm = named if isinstance(named, Rpm) else None

    def change(self, described: Mapping[str, Any]) -> None:
        """Take over the settings of the engines."""
        self._limits.set_tenants(msgspec.convert(described["limits"], dict[str, TenantLimits]))
        policy = make_policy(described["policy"], described["options"])
        self._rpm = policy if isinstance(policy, Rpm) else None

    def enter(self, tenant: str) -> None:
        """Count a request that arrives, or raise Refused."""
        now = self._clock()
        account = self._waiting.get(tenant) or Account(tenant, 0)
        self._limits.check(account, 0, 1, now)
        if self._rpm is not None:
            self._limits.check_rate(tenant, self._rpm.limit, self._rpm.window, now)
        self._limits.note_accepted(tenant, now, None if self._rpm is None else self._rpm.window)
        account.num_waiting += 1
        self._waiting[tenant] = account

    def begin(self, tenant: str) -> None:
        """Note that a request of the tenant waits no longer."""
        account = self._waiting[tenant]
        account.num_waiting -= 1
        if not account.num_waiting:
            del self._waiting[tenant]
