"""Shares: each tenant's service counted once over all replicas, so that fair policies compare the whole.

A front counts what it delivers, by tenant and replica, as sums that only grow. Before a request goes to a replica, the
replica hears what its tenants were served elsewhere through this front (`elsewhere`), and charges what is new of it to
their counters (`engine/remote.py`). Sums instead of differences make a message that is lost or repeated harmless, and
let any number of fronts count beside each other, as each request passes one.

The bound. VTC on one engine keeps two tenants that both wait all the time within 2 max(wp Lin, wq M) of each other: Lin
is the longest prompt, M the most tokens that running requests hold. Over N replicas at which both wait, whose counters
lag by at most D seconds behind tokens served at R a second elsewhere, the same proof holds with N M in the place of M
and the lag on top: 2 (max(wp Lin, wq N M) + N R D). Weights divide it. `tests/cluster/test_shares.py` tries it.
"""

from __future__ import annotations

MAX_TENANTS = 20_000  # that are remembered; those of least service are forgotten first


class Shares:
    """Service by replica and tenant, as one front has delivered it."""

    def __init__(self) -> None:
        self._served: dict[str, dict[str, float]] = {}  # by replica
        self._total: dict[str, float] = {}
        self._news: dict[str, set[str]] = {}  # by replica: tenants that were served elsewhere since it was told

    def note(self, replica: str, tenant: str, amount: float) -> None:
        """Count service."""
        if tenant not in self._total and len(self._total) >= MAX_TENANTS:
            self._forget()
        served = self._served.setdefault(replica, {})
        served[tenant] = served.get(tenant, 0.0) + amount
        self._total[tenant] = self._total.get(tenant, 0.0) + amount
        for other, news in self._news.items():
            if other != replica:
                news.add(tenant)

    def elsewhere(self, replica: str) -> dict[str, float]:
        """Return the sums by tenant of all other replicas, of tenants whose sums have changed since the last call."""
        if replica not in self._news:
            self._news[replica] = set(self._total)
        own, news = self._served.get(replica, {}), self._news[replica]
        self._news[replica] = set()
        sums = {tenant: self._total[tenant] - own.get(tenant, 0.0) for tenant in news if tenant in self._total}
        return {tenant: amount for tenant, amount in sums.items() if amount > 0}

    def restart(self, replica: str) -> None:
        """Note that a replica's engine is a new one: all service is another's to it, and it is told all sums again."""
        self._news.pop(replica, None)
        self._served.pop(replica, None)

    def _forget(self) -> None:
        for tenant in sorted(self._total, key=self._total.__getitem__)[: MAX_TENANTS // 2]:
            for sums in (self._total, *self._served.values()):
                sums.pop(tenant, None)
