"""Admission: which waiting requests start to run, in the policy's order and within every budget.

A request that does not fit is overtaken by those behind it that do, up to a bound. One whose adapter is still loading
is set aside until the adapter is on the device.
"""

from __future__ import annotations

from collections.abc import Collection

from inlaid.engine.decodes import Decodes
from inlaid.engine.endings import Endings
from inlaid.engine.policy import GO, REFUSE
from inlaid.engine.progress import Progress
from inlaid.engine.refusal import Refusal, RefusalKind
from inlaid.engine.request import Request, Status, Work
from inlaid.engine.seats import Seats
from inlaid.engine.state import State
from inlaid.engine.working_set import LOADING, READY

MAX_LOOKED_AT = 32  # requests that do not fit are overtaken at most this deep into the queue
MAX_AWAITED = 64  # adapters that requests near the front wait for at the same time
MAX_PREFETCHED = 8  # of them while there is no room for their requests yet


class Admission:
    """Move requests from the queue into the batch."""

    def __init__(self, state: State, decodes: Decodes, endings: Endings) -> None:
        self.state = state
        self.num_admitted = 0
        self._decodes = decodes
        self._endings = endings
        self._seats = Seats(state)

    def promote(self) -> None:
        """Make requests senior that have waited as long as the policy lets later ones overtake them."""
        state = self.state
        grown = state.seniority.promote(state.view.now - state.policy.seniority_s)
        if grown:
            aside = state.working_set.is_aside
            state.waiting.promote(request for request in grown if not aside(state.progress[request.id]))
            state.nothing_fits = None

    def recall(self) -> None:
        """Put requests whose adapter has come back into the queue; end those whose adapter cannot come."""
        if not self.state.working_set.aside:
            return
        for progress, adapter in self.state.working_set.take_settled(self.state.view.now):
            if isinstance(adapter, Refusal):
                self._refuse_for_adapter(progress, adapter)
            else:
                self._note_wait(progress)
                self.state.enqueue(progress.request)

    def _note_wait(self, progress: Progress) -> None:
        """Split the seconds that a request was set aside: its adapter was copied last, read before, and waited for
        room or for other adapters in what is left."""
        since, identity = progress.aside_since, progress.request.adapter
        waited = 0.0 if since is None or identity is None else self.state.view.now - since
        read, copy = self.state.adapters.load_seconds(identity) if identity is not None else (0.0, 0.0)
        progress.adapter_time, progress.adapter_copy = waited, min(copy, waited)
        progress.adapter_read = min(read, waited - progress.adapter_copy)

    def admit(self, budget: int) -> list[Work]:
        """Start requests while they fit, and return their works."""
        state = self.state
        works: list[Work] = []
        if self._nothing_fits_still():
            return works
        overtaken: list[Progress] = []
        seated: set[str] = set()  # tenants that hold their seats, left out as long as others can use what is free
        while budget > 0 and self._seats.num_free > 0 and len(overtaken) < MAX_LOOKED_AT:
            progress = self._next(seated)
            if progress is None:
                break
            # Behind a request that finds no room no adapter is fetched: it would push out what the first will need.
            if self._given_up(progress) or self._stands_aside(progress, 0 if overtaken else MAX_AWAITED):
                continue
            hits = self._fits(progress, budget, self._overdue_adapter())
            if hits is None:
                overtaken.append(progress)
            else:
                self._start(progress, hits)
                works.append(self._decodes.prefill(progress, budget))
                budget -= works[-1].num_tokens
            if overtaken and (state.policy.strict or any(map(self._overtaken_too_often, overtaken))):
                break
        for progress in overtaken:
            state.waiting.push(progress.request)
        if overtaken and not works:
            state.nothing_fits = (state.pool.num_available, len(state.running))
        return works

    def free_a_seat(self) -> None:
        """Preempt a request of the tenant that holds most seats above its limit, if all seats are taken and a tenant
        below its own could start a request otherwise."""
        state = self.state
        account = self._seats.greediest()
        request = None if account is None else state.waiting.pop(self._seats.holders())
        if request is None:
            return
        progress, budget = state.progress[request.id], state.config.max_num_batched_tokens
        if self._stands_aside(progress, MAX_PREFETCHED):
            return
        state.waiting.push(request)
        if self._fits(progress, budget, self._overdue_adapter()) is not None:
            held = [other for other in state.running.values() if other.request.account is account]
            self._endings.preempt(max(held, key=lambda other: state.standing(other.request)))

    def fetch(self) -> None:
        """Ask for the adapters of requests set aside. Call after admission: what has arrived is pinned then, and cannot
        be pushed out by what is asked for now."""
        self._prefetch()
        if self.state.working_set.aside:
            self.state.working_set.want(self._overdue_adapter())

    def _next(self, seated: set[str]) -> Progress | None:
        """Take the first in the queue, of tenants that need not leave their seats to others if there are such."""
        state = self.state
        request = self._pop(seated)
        while request is not None and self._seats.leaves_to_others(request.account):
            seated.add(request.tenant)
            state.waiting.push(request)
            request = self._pop(seated)
        if request is None and seated:
            request = self._pop(())
        return None if request is None else state.progress[request.id]

    def _pop(self, without: Collection[str]) -> Request | None:
        """Take the first in the queue. If no further adapter may enter the batch and the policy groups by adapter, take
        the first of those that may, as long as the bound on overtaking allows."""
        state = self.state
        first = state.waiting.peek(without) if state.working_set.full and state.policy.groups_of(None) else None
        if first is None or state.working_set.has_room(first.adapter, first.senior):
            return state.waiting.pop(without)
        if self._overtaken_too_often(state.progress[first.id]):
            return None
        names = {name for adapter in (*state.working_set.active, None) for name in state.policy.groups_of(adapter)}
        return state.waiting.pop_among(names, without)

    def _nothing_fits_still(self) -> bool:
        """Return True if the last look found no request that fits, and nothing has been freed or added since."""
        state = self.state
        if state.nothing_fits is None:
            return False
        available, running = state.nothing_fits
        return state.pool.num_available <= available and len(state.running) >= running

    def _given_up(self, progress: Progress) -> bool:
        """Apply the policy's verdict on a request that it may give up."""
        state, request = self.state, progress.request
        verdict = state.policy.verdict(request, state.view)
        if verdict == REFUSE:
            seconds = state.limits.retry_after(state.num_waiting)
            message = f"its deadline can no longer be met under this load; try again in {seconds:.0f} s"
            self._endings.refuse(progress, Refusal(message, RefusalKind.DEADLINE, retry_after=seconds))
        elif verdict != GO:
            request.late = True
            state.waiting.push(request)
        return verdict != GO

    # Adapters on their way.

    def _stands_aside(self, progress: Progress, most: int) -> bool:
        """Set a request aside if its adapter is loading and fewer than `most` are awaited; end it if that cannot
        come."""
        state, identity = self.state, progress.request.adapter
        aside, adapter = state.working_set.aside, state.working_set.state(identity)
        if adapter == READY or (adapter == LOADING and len(aside) >= most and identity not in aside):
            return False
        if isinstance(adapter, Refusal):
            self._refuse_for_adapter(progress, adapter)
        else:
            if progress.overtaken_since is None:
                progress.overtaken_since = self.num_admitted
            state.working_set.set_aside(progress, state.view.now)
        return True

    def _refuse_for_adapter(self, progress: Progress, why: Refusal) -> None:
        message = f"adapter {progress.request.adapter_name!r}: {why.message}"
        later = why.kind is RefusalKind.UNAVAILABLE
        seconds = self.state.limits.retry_after(self.state.num_waiting) if later else None
        self._endings.refuse(progress, Refusal(message, why.kind, retry_after=seconds))

    def _prefetch(self) -> None:
        """Set the next requests aside while the batch is full, so that their adapters are loaded by their turn."""
        state = self.state
        while len(state.working_set.aside) < MAX_PREFETCHED:
            request = state.waiting.peek()
            if request is None or state.working_set.state(request.adapter) == READY:
                return
            state.waiting.pop()
            if not self._stands_aside(state.progress[request.id], MAX_PREFETCHED):
                state.waiting.push(request)
                return

    def _overdue_adapter(self) -> str | None:
        """Return the adapter of a request set aside that was overtaken too often: until it is on the device no other
        adapter's request is admitted and no other adapter is fetched, so that room for it comes free."""
        for identity, waiting in self.state.working_set.aside.items():
            if self._overtaken_too_often(waiting[0]):
                return identity
        return None

    def _overtaken_too_often(self, progress: Progress) -> bool:
        if progress.overtaken_since is None:
            progress.overtaken_since = self.num_admitted
        return self.num_admitted - progress.overtaken_since >= self.state.config.max_overtakes

    # Budgets.

    def _fits(self, progress: Progress, budget: int, closed_for: str | None) -> list[int] | None:
        """Return the blocks of the request's cached prefix if every budget allows it now, else None."""
        state, request = self.state, progress.request
        identity = request.adapter
        if identity is not None and closed_for not in (None, identity):
            return None
        if state.working_set.state(identity) != READY or not state.working_set.has_room(identity, request.senior):
            return None
        if progress.num_pending:
            return None  # preempted while a step was in flight: its token comes first
        hits = state.prefix.match(progress)
        remaining = len(request.tokens) - len(hits) * state.pool.block_size
        if not state.config.enable_chunked_prefill and remaining > budget:
            return None
        return hits if self._has_memory(progress, hits) else None

    def _has_memory(self, progress: Progress, hits: list[int]) -> bool:
        """Check that blocks for all its tokens so far are free, and that a share of all predicted answers fits too."""
        state, request = self.state, progress.request
        pool = state.pool
        fresh = state.blocks_for(len(request.tokens)) - len(hits) + pool.num_idle(hits)
        progress.num_reserved = fresh
        if not state.running:
            pool.want(fresh, 0, request.adapter)
            return fresh <= pool.num_available
        margin = int(state.config.admission_margin * pool.capacity)
        if fresh + margin > pool.num_available and not pool.want(fresh + margin, 0, request.adapter):
            return False
        # Not before: a prediction is kept, and a request that has to wait shall have one made with more history.
        growth = int(state.config.reserve * state.view.lengths.remaining(request)) // pool.block_size
        progress.num_reserved += growth
        reserved = state.num_reserved + progress.num_reserved
        pool.want(fresh + margin, reserved, request.adapter)
        return reserved <= pool.capacity

    def _start(self, progress: Progress, hits: list[int]) -> None:
        """Turn a waiting request into a running one, with blocks for all its tokens so far."""
        state, request, now = self.state, progress.request, self.state.view.now
        state.pool.share(hits)
        request.blocks = hits + state.pool.allocate(state.blocks_for(len(request.tokens)) - len(hits))
        progress.shares_prefix = bool(hits)
        progress.num_computed = len(hits) * state.pool.block_size
        request.status = Status.RUNNING
        progress.overtaken_since = progress.aside_since = None
        state.num_reserved += progress.num_reserved
        state.running[request.id] = progress
        progress.host_since = state.host_share
        self.num_admitted += 1
        state.limits.note_admitted(now, others_wait=len(state.waiting) > 0)
        self._charge_start(progress)
        state.working_set.enter(request.adapter)

    def _charge_start(self, progress: Progress) -> None:
        """Charge the cached prefix and, the first time, what the policy charges ahead."""
        state, request, account = self.state, progress.request, progress.request.account
        state.ledger.enter_batch(account)
        state.ledger.leave_queue(account)
        found = min(progress.num_computed, request.num_prompt)
        if found > progress.num_charged:
            state.ledger.charge_cached(account, progress.num_charged, found)
            progress.num_charged = found
        if progress.first_scheduled is None:
            progress.first_scheduled = state.view.now
            progress.num_cached = progress.num_computed
            count = state.policy.prepay(request, state.view)
            if count:
                state.ledger.prepay(request, count)
