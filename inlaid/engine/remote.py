"""RemoteCharges: what tenants were served by other replicas, charged to their counters here, so that fair policies
compare the whole. `cluster/shares.py` makes the sums.
"""

from __future__ import annotations

from collections.abc import Mapping

from inlaid.engine.ledger import Ledger


class RemoteCharges:
    """Sums of service by front and tenant, as last heard."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: dict[str, dict[str, float]] = {}  # by front: the sums it told last

    def take(self, front: str, sums: Mapping[str, float]) -> None:
        """Charge what is new in a front's sums."""
        known = self._known.setdefault(front, {})
        for tenant, amount in sums.items():
            fresh = amount - known.get(tenant, 0.0)
            if fresh > 0:
                self._ledger.charge_elsewhere(tenant, fresh)
                known[tenant] = amount
