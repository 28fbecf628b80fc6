"""Seats: the places in a step, one for each running request, and how many of them a tenant may hold.

While other tenants wait, a tenant holds at most its share by weight, or an eighth of all seats if that is more: many
small tenants then run in the policy's order undisturbed. `max_seqs_per_tenant` replaces this limit. A tenant alone may
hold all seats; when another comes, seats change hands one a step.
"""

from __future__ import annotations

from inlaid.engine.account import Account
from inlaid.engine.state import State


class Seats:
    """Count seats and compare what tenants hold with what they may hold."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.count = min(state.config.max_num_seqs, state.config.max_num_batched_tokens)
        self._free_of_limit = state.config.max_seqs_per_tenant or max(1, self.count // 8)  # for any tenant

    @property
    def num_free(self) -> int:
        return self.count - len(self._state.running)

    def limit(self, account: Account) -> int:
        """Return the seats that a tenant may hold while others wait."""
        if self._state.config.max_seqs_per_tenant:
            return self._state.config.max_seqs_per_tenant
        return max(self._free_of_limit, self._state.ledger.share(account, self.count))

    def leaves_to_others(self, account: Account) -> bool:
        """Return True if a waiting tenant has to leave a free seat to other tenants that wait.

        It has if it holds its seats and there are no more free ones than tenants that wait; a limit that was set holds
        however many are free.
        """
        ledger, config = self._state.ledger, self._state.config
        if account.num_running < self._free_of_limit or ledger.num_backlogged < 2:
            return False
        if self.num_free > ledger.num_backlogged and not config.max_seqs_per_tenant:
            return False
        return account.num_running >= self.limit(account)

    def greediest(self) -> Account | None:
        """Return the tenant that holds most seats above its limit, if all seats are taken and anyone waits."""
        ledger, least = self._state.ledger, self._free_of_limit
        if ledger.most_running <= least or self.num_free > 0 or not ledger.num_backlogged:
            return None
        ledger.most_running = max(account.num_running for account in ledger.running.values())
        greedy = [a for a in ledger.running.values() if a.num_running > least and a.num_running > self.limit(a)]
        return max(greedy, key=lambda a: (a.num_running - self.limit(a), -a.order), default=None)

    def holders(self) -> set[str]:
        """Return the tenants that hold as many seats as they may."""
        return {a.tenant for a in self._state.ledger.running.values() if a.num_running >= self.limit(a)}
