"""The ledger: the service of each tenant. The scheduler charges every token once; policies, /metrics and the fairness
view read.

A tenant has two amounts. `service` is exact: the tokens computed and delivered, at the prices of cost.py; tokens that
came after the end of an answer's text are taken back. `counter` is the virtual time of fair policies (VTC, DRR):
service over weight, lifted when a tenant comes back from idleness (which saves up no credit). Policies that charge
predicted outputs charge the counter ahead and refund the rest. A tenant that comes back is lifted to what others were
delivered and what it paid ahead itself: lifted to all that they paid, it would stay behind by what they have running.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

from inlaid.engine.account import Account
from inlaid.engine.cost import Cost, LinearCost
from inlaid.engine.request import Request

HISTORY_SECONDS = 3600
# Within these bounds a counter of 10^12 still tells two tokens apart: no order breaks down, and no sum overflows.
MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3


class Ledger:
    """Owner of the accounts."""

    def __init__(self, cost: Cost | None = None, max_accounts: int = 20_000) -> None:
        self.cost: Cost = cost or LinearCost()
        self._price = self.cost.output(0, 1, 1) if isinstance(self.cost, LinearCost) else 0.0
        self.accounts: dict[str, Account] = {}
        self.num_backlogged = 0  # tenants with requests waiting
        self.running: dict[str, Account] = {}  # of tenants with requests running
        self.most_running = 0  # no tenant has more requests running; seats.py lowers it
        self._present_weight = 0  # of tenants with requests waiting or running, in millionths: exact
        self.total = 0.0  # everything ever charged
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.history: deque[tuple[float, dict[str, float]]] = deque()
        self._prepaid: dict[str, int] = {}  # output tokens charged ahead, by request id
        self._max_accounts = max_accounts
        self._forgotten = 0.0
        self._num_seen = 0
        self._weights: dict[str, float] = {}
        self._backlog: list[tuple[float, int, int, Account]] = []
        self._last_departed: Account | None = None
        self._noted_at = float("-inf")

    def account(self, tenant: str) -> Account:
        """Return the tenant's account; its first request opens it."""
        found = self.accounts.get(tenant)
        if found is None:
            if len(self.accounts) >= self._max_accounts:
                self._forget_idle()
            found = Account(tenant, self._num_seen, self._weights.get(tenant, 1.0), self._price)
            self.accounts[tenant] = found
            self._num_seen += 1
        return found

    def set_weights(self, weights: dict[str, float]) -> None:
        """Replace all weights; tenants not named get 1. The past stays charged as it was."""
        for tenant, weight in weights.items():
            if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
                raise ValueError(
                    f"weight of tenant {tenant!r} is {weight}; it must be a positive number, from {MIN_WEIGHT:g} to "
                    f"{MAX_WEIGHT:g}"
                )
        self._weights = dict(weights)
        for account in self.accounts.values():
            counter, account.weight = account.counter, self._weights.get(account.tenant, 1.0)
            account.counter = counter
        present = [a for a in self.accounts.values() if a.num_waiting or a.num_running]
        self._present_weight = sum(map(_millionths, present))

    @property
    def weights(self) -> dict[str, float]:
        return dict(self._weights)

    # The queue: a tenant that comes back is lifted to the tenants that waited meanwhile.

    def enter_queue(self, account: Account, lift: bool = True) -> None:
        """Count a request that starts to wait. A preempted request comes back without a lift."""
        if account.num_waiting == 0:
            if lift:
                self._lift(account)
            self._rank(account)
            self.num_backlogged += 1
            if account.num_running == 0:
                self._present_weight += _millionths(account)
        account.num_waiting += 1

    def leave_queue(self, account: Account) -> None:
        account.num_waiting -= 1
        assert account.num_waiting >= 0
        if account.num_waiting == 0:
            self.num_backlogged -= 1
            if account.num_running == 0:
                self._present_weight -= _millionths(account)
        self._last_departed = account

    def enter_batch(self, account: Account) -> None:
        """Count a request of this tenant that starts to run. It still counts as waiting: call before leave_queue."""
        account.num_running += 1
        self.running[account.tenant] = account
        self.most_running = max(self.most_running, account.num_running)

    def leave_batch(self, account: Account) -> None:
        """Count a request of this tenant that no longer runs."""
        account.num_running -= 1
        if account.num_running == 0:
            del self.running[account.tenant]
            if account.num_waiting == 0:
                self._present_weight -= _millionths(account)

    def share(self, account: Account, num_seats: int) -> int:
        """Return a present tenant's share of the seats by weight, rounded up."""
        return -(-num_seats * _millionths(account) // self._present_weight)

    def _lift(self, account: Account) -> None:
        lowest = self.lowest_backlogged() or self._last_departed
        if lowest is not None:
            own = account.ahead / account.weight
            account.counter = max(account.counter, lowest.delivered + own)

    def lowest_backlogged(self) -> Account | None:
        """Return the waiting tenant with the smallest counter. An entry is re-keyed only when it reaches the top."""
        while self._backlog:
            counter, _, version, account = self._backlog[0]
            if version != account.version or account.num_waiting == 0:
                heapq.heappop(self._backlog)
            elif counter < account.counter:
                heapq.heapreplace(self._backlog, (account.counter, account.order, version, account))
            else:
                return account
        return None

    def _rank(self, account: Account) -> None:
        account.version += 1
        heapq.heappush(self._backlog, (account.counter, account.order, account.version, account))

    # Charges.

    def charge_prefill(self, account: Account, start: int, end: int) -> None:
        account.prompt_tokens += end - start
        self.num_prompt_tokens += end - start
        self._charge(account, self.cost.prefill(start, end))

    def charge_cached(self, account: Account, start: int, end: int) -> None:
        account.cached_tokens += end - start
        self.num_cached_tokens += end - start
        self._charge(account, self.cost.cached(start, end))

    def charge_outputs(self, served: Sequence[Request]) -> None:
        """Charge the newest token of each of these; the counter has prepaid ones already."""
        self.total += len(served) * self._price
        self.num_output_tokens += len(served)
        for request in served:
            request.account.output_tokens += 1
        if self._prepaid or not self._price:
            for request in served:
                self._charge_output(request)

    def _charge_output(self, request: Request) -> None:
        """Charge what counting the newest token has not: its own price, or that it was prepaid."""
        account, num_prompt = request.account, len(request.prompt)
        number = len(request.tokens) - num_prompt
        prepaid = number <= self.prepaid(request)
        if not self._price:
            cost = self.cost.output(num_prompt, number, number)
            self.total += cost
            account.charged += cost
            account.virtual += 0.0 if prepaid else cost / account.weight
            account.ahead -= cost if prepaid else 0.0
        elif prepaid:
            account.virtual -= self._price / account.weight
            account.ahead -= self._price

    def _charge(self, account: Account, cost: float) -> None:
        self.total += cost
        account.charged += cost
        account.virtual += cost / account.weight

    def charge_elsewhere(self, tenant: str, amount: float) -> None:
        """Charge service that another replica delivered: to the counter alone, as this engine delivered nothing."""
        account = self.account(tenant)
        account.virtual += amount / account.weight

    def refund_outputs(self, account: Account, num_prompt: int, first: int, last: int, prepaid: int = 0) -> None:
        """Take back output tokens number `first` to `last`: they came after the answer had ended. Those up to number
        `prepaid` were charged ahead; `settle` gives that back."""
        count = last - first + 1
        cost = self.cost.output(num_prompt, first, last)
        begin = max(first, prepaid + 1)
        account.ahead += self.cost.output(num_prompt, first, min(begin - 1, last)) if begin > first else 0.0
        counted = self.cost.output(num_prompt, begin, last) if begin <= last else 0.0
        account.output_tokens -= count
        self.num_output_tokens -= count
        self.total -= cost
        account.charged -= 0.0 if self._price else cost
        account.virtual += ((cost if self._price else 0.0) - counted) / account.weight
        if account.num_waiting:
            self._rank(account)

    def prepaid(self, request: Request) -> int:
        """Return how many of a request's output tokens were charged ahead."""
        return self._prepaid.get(request.id, 0)

    def prepay(self, request: Request, count: int) -> None:
        """Charge `count` predicted outputs ahead: on the counter only, as nothing is delivered yet."""
        self._prepaid[request.id] = count
        cost = self.cost.output(request.num_prompt, 1, count)
        request.account.virtual += cost / request.account.weight
        request.account.ahead += cost

    def settle(self, request: Request) -> bool:
        """Give back what was prepaid for a request that ended after fewer outputs; return True if the counter fell."""
        prepaid, account = self._prepaid.pop(request.id, 0), request.account
        if prepaid <= request.num_outputs:
            return False
        left = self.cost.output(request.num_prompt, request.num_outputs + 1, prepaid)
        account.virtual -= left / account.weight
        account.ahead -= left
        if account.num_waiting:
            self._rank(account)
        return True

    # The past.

    def note(self, now: float) -> None:
        """Once a second or so, append the service since the last note to the history."""
        if now < self._noted_at + 1.0:
            return
        served: dict[str, float] = {}
        for account in self.accounts.values():
            service = account.service
            if service != account.noted:
                served[account.tenant] = service - account.noted
                account.noted = service
        self.history.append((now, served))
        self._noted_at = now
        while self.history[0][0] < now - HISTORY_SECONDS:
            self.history.popleft()

    def served(self, now: float, window: float) -> dict[str, float]:
        """Return the service per tenant in the last `window` seconds, to the second."""
        sums = {account.tenant: account.service - account.noted for account in self.accounts.values()}
        for when, served in reversed(self.history):
            if when <= now - window:
                break
            for tenant, amount in served.items():
                sums[tenant] = sums.get(tenant, 0.0) + amount
        return {tenant: amount for tenant, amount in sums.items() if amount}

    def _forget_idle(self) -> None:
        """Close accounts of idle tenants, lowest counters first: on return they would be lifted anyway."""
        idle = [a for a in self.accounts.values() if not a.num_waiting and not a.num_running]
        for account in sorted(idle, key=lambda a: (a.counter, a.order))[: max(1, len(idle) // 2)]:
            self._forgotten += account.service
            del self.accounts[account.tenant]

    @property
    def forgotten(self) -> float:
        """Service of accounts that were closed."""
        return self._forgotten


def _millionths(account: Account) -> int:
    return round(account.weight * 1_000_000)
