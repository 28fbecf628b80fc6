"""What each step computes: admission, chunked prefill, decode, preemption, finishing, and the blocks behind them.

The engine is the only caller: add and abort at any moment, then schedule and commit (or fail) once per step; with an
overlapping runner schedule runs one step ahead of commit. Who goes first is the policy's business; budgets are kept
here, once, for all policies. The scheduler is the only writer of Request, the block pool and the ledger.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from inlaid.config import CacheConfig, SchedulerConfig
from inlaid.engine.intake import check_config, make_cost, make_request, most_tokens
from inlaid.engine.kv_cache import BlockPool, extend_keys, root_key
from inlaid.engine.ledger import Ledger
from inlaid.engine.limits import Gate
from inlaid.engine.policy import GO, REFUSE, Inlaid, Lengths, MaxTokens, Policy, Rpm, View, parse_policy
from inlaid.engine.refusal import Refusal, RefusalKind, Refused
from inlaid.engine.request import (
    Batch,
    FinishReason,
    NewRequest,
    Output,
    Request,
    Sampled,
    Status,
    StepResult,
    TokenLogprobs,
    Work,
)
from inlaid.engine.residency import AdapterDirectory
from inlaid.engine.tasks import LOADING, READY, Tasks
from inlaid.engine.waiting import WaitingQueue

MAX_LOOKED_AT = 32  # requests that do not fit are passed by others at most this deep into the queue
MAX_PARKED = 64  # adapters that requests near the front wait for at the same time
MAX_PREFETCHED = 8  # of them while there is no room for their requests yet


@dataclass(frozen=True)
class _Limbo:
    """What an ended or preempted request held, until every step up to `step`, which may write it, is over."""

    step: int
    blocks: list[int]
    adapter: str | None


class Scheduler:
    """Owner of the requests, their order, and the pool of KV blocks."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        adapters: AdapterDirectory,
        eos_ids: Collection[int] = (),
        lengths: Lengths | None = None,
        base_version: str = "",
        max_adapter_wait: float = math.inf,
        pool: BlockPool | None = None,
    ) -> None:
        check_config(config)
        self.config = config
        self.cache = cache
        self.max_model_len = max_model_len
        self.eos_ids = frozenset(eos_ids)
        self.adapters = adapters
        self.base_version = base_version
        self.pool = pool or BlockPool(num_blocks, cache.block_size)
        self.ledger = Ledger(make_cost(config))
        self.tasks = Tasks(adapters, config.max_sum_of_ranks, max_adapter_wait)
        self.view = View(self.ledger, lengths or MaxTokens(), active=self.tasks.active)
        self.view.tokens_per_step = config.max_num_batched_tokens
        self.gate = Gate(config.max_num_waiting)
        self.requests: dict[str, Request] = {}  # everyone who has not ended
        self.running: dict[str, Request] = {}
        self.waiting = WaitingQueue(parse_policy(config.policy), self.view)
        self.num_preemptions = 0
        self.num_admitted = 0
        self._num_reserved = 0  # blocks that the running were admitted on
        self._num_added = 0
        self._step = 0
        self._num_promised = 0  # running requests that wait for blocks in limbo
        self._submitted: deque[tuple[int, float]] = deque()  # steps in flight, and when they were made
        self._committed_at = 0.0
        self._limbo: list[_Limbo] = []
        self.released: list[str] = []  # who has ended or was preempted since the last batch; the next one says so
        self._outputs: list[Output] = []  # ends that no step brought about
        self._stuck: tuple[int, int, int] | None = None
        self.set_policy(self.waiting.policy)

    # Arrival and departure.

    @property
    def policy(self) -> Policy:
        return self.waiting.policy

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self.tasks.num_parked

    @property
    def has_work(self) -> bool:
        return bool(self.requests or self._outputs)

    def set_policy(self, policy: Policy) -> None:
        """Change the order from the next step on; nobody is dropped."""
        most = self.config.max_tasks_per_step
        self.tasks.max_tasks = min(most or policy.beta, policy.beta) if isinstance(policy, Inlaid) else most
        self._stuck = None
        self.waiting.reorder(policy)

    def add(self, new: NewRequest, now: float) -> Request:
        """Queue a request, or raise Refused."""
        if new.id in self.requests:
            raise Refused(Refusal(f"request id {new.id!r} is in use"))
        limit = most_tokens(new, self.max_model_len, self.pool, self.config)
        account = self.ledger.account(new.tenant)
        rpm = self.policy if isinstance(self.policy, Rpm) else None
        self.gate.check(account, self.num_waiting, self.ledger.num_backlogged, now)
        if rpm is not None:
            self.gate.check_rate(new.tenant, rpm.limit, rpm.window, now)
        identity = self._resolve(new.adapter)
        self._num_added += 1
        request = make_request(new, identity, limit, now, self._num_added, self.eos_ids)
        request.account = account
        self.gate.note_accepted(new.tenant, now, limited=rpm is not None)
        self.requests[request.id] = request
        account.num_requests += 1
        self.ledger.enter_queue(account)
        self._enqueue(request)
        return request

    def _resolve(self, name: str | None) -> str | None:
        try:
            return None if name is None else self.adapters.resolve(name)
        except ValueError as error:
            raise Refused(Refusal(str(error), RefusalKind.NOT_FOUND)) from error

    def _enqueue(self, request: Request) -> None:
        self.waiting.push(request)
        self._stuck = None

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a request now, whatever it is doing. False: it is unknown, or has ended already."""
        request = self.requests.get(request_id)
        if request is not None:
            self._end_early(request, reason)
        return request is not None

    def take_outputs(self) -> list[Output]:
        """Ends that happened between steps (aborts, refusals)."""
        outputs, self._outputs = self._outputs, []
        return outputs

    # One step ahead: what to compute.

    def schedule(self, now: float) -> Batch | None:
        """The next step's batch, or None when nothing can be computed now."""
        self.view.now = now
        self.ledger.note(now)
        preemptions = self.num_preemptions
        singles, prefills, budget = self._running_work()
        if self.tasks.parked:
            self._unpark()
        if preemptions == self.num_preemptions:
            admitted = self._admit(budget, now)
            singles += [work for work in admitted if work.num_tokens == 1]
            prefills += [work for work in admitted if work.num_tokens > 1]
        self._prefetch()
        if self.tasks.parked:
            # After admission, when what has arrived is pinned and cannot be pushed out by what is asked for now.
            self.tasks.want(self._overdue_adapter())
        works = singles + prefills
        if not works:
            return None
        self._step += 1
        self._submitted.append((self._step, now))
        released, self.released = tuple(self.released), []
        return Batch(self._step, tuple(works), released)

    def _running_work(self) -> tuple[list[Work], list[Work], int]:
        """Decode first, one token each; then the prompts that are under way, as far as the budget goes."""
        block_size = self.pool.block_size
        self._num_promised = 0
        preemptions = self.num_preemptions
        singles: list[Work] = []
        unfinished: list[Request] = []
        for request in list(self.running.values()):
            start = request.num_computed
            if start < request.decode_until:
                request.num_computed = start + 1
                singles.append(Work(request, start, 1, True, True))
                continue
            known, limit, must_see = len(request.tokens), request.limit, request.must_see
            if start + 1 < known or request.num_charged < len(request.prompt):
                unfinished.append(request)
                continue
            if start >= known and (start + 1 >= limit or must_see):
                continue  # its newest token must be seen first, or is the last
            if start >= len(request.blocks) * block_size and not self._grow(request):
                continue
            request.num_computed = start + 1
            singles.append(Work(request, start, 1, start + 1 < limit, start + 2 < limit))
            if not must_see:
                request.decode_until = min(len(request.blocks) * block_size, limit - 2)
        if self.num_preemptions != preemptions:
            singles = _still_running(singles)
        budget = self.config.max_num_batched_tokens - len(singles)
        prefills: list[Work] = []
        for request in unfinished:
            if request.status is Status.RUNNING and budget > 0:
                work = self._prefill(request, budget)
                budget -= work.num_tokens
                (singles if work.num_tokens == 1 else prefills).append(work)
        return singles, prefills, budget

    def _prefill(self, request: Request, budget: int) -> Work:
        start, total = request.num_computed, len(request.tokens)
        count = min(total - start, budget)
        first, last = max(start, request.num_charged), min(start + count, request.num_prompt)
        if first < last:
            self.ledger.charge_prefill(request.account, first, last)
            request.num_charged = last
        samples = start + count == total and total < request.limit
        request.num_computed = start + count
        return Work(request, start, count, samples)

    def _grow(self, request: Request) -> bool:
        """One more block; others are preempted for it, last in the policy's order first, maybe itself."""
        while request.status is Status.RUNNING:
            if self.pool.num_available or self.pool.want(1, 0, request.adapter):
                request.blocks.append(self.pool.take())
                return True
            if self._num_promised < sum(len(held.blocks) for held in self._limbo):
                self._num_promised += 1  # enough comes free when the step in flight is committed
                return False
            self._preempt(max(self.running.values(), key=self.standing))
        return False

    def standing(self, request: Request) -> tuple[tuple[float, ...], int]:
        """Its place in the policy's order now; smaller goes first."""
        policy, view = self.policy, self.view
        return policy.key(policy.group(request), policy.rank(request, view), view), request.order

    def _preempt(self, request: Request) -> None:
        """Give up its KV; it waits again, keeps its outputs, and computes everything anew."""
        self.num_preemptions += 1
        request.num_preemptions += 1
        self._leave_running(request)
        request.num_owed = request.num_inflight
        request.num_computed = request.decode_until = 0
        request.prefilled = False
        request.status = Status.WAITING
        self.ledger.enter_queue(request.account, lift=False)
        self._enqueue(request)

    # Admission.

    def _admit(self, budget: int, now: float) -> list[Work]:
        """Take requests from the queue while they fit. One that does not fit is passed by those that do, up to a
        bound; one whose adapter is on its way steps aside."""
        works: list[Work] = []
        if self._is_stuck():
            return works
        passed: list[Request] = []
        while budget > 0 and len(self.running) < self._max_running and len(passed) < MAX_LOOKED_AT:
            request = self._next()
            if request is None:
                break
            # Behind one that finds no room nothing is fetched: it would push out what the first will need.
            if self._given_up(request) or self._stands_aside(request, 0 if passed else MAX_PARKED):
                continue
            hits = self._fits(request, budget, self._overdue_adapter())
            if hits is None:
                passed.append(request)
            else:
                self._start(request, hits, now)
                works.append(self._prefill(request, budget))
                budget -= works[-1].num_tokens
            if passed and (self.policy.strict or any(self._passed_too_often(other) for other in passed)):
                break
        for request in passed:
            self.waiting.push(request)
        if passed and not works:
            self._stuck = (self.pool.num_available, len(self.running), self._num_added)
        return works

    def _next(self) -> Request | None:
        """The first in the queue; where no further task may enter the batch and the policy sorts by task, the first of
        those that may, as long as the bound on passing allows."""
        if not self.tasks.full or not self.policy.groups_are_tasks:
            return self.waiting.pop()
        first = self.waiting.peek()
        if first is not None and not self.tasks.has_room(first.adapter) and self._passed_too_often(first):
            return None
        return self.waiting.pop_among({*self.tasks.active, None})

    @property
    def _max_running(self) -> int:
        return min(self.config.max_num_seqs, self.config.max_num_batched_tokens)

    def _is_stuck(self) -> bool:
        """Whether the last look found nobody who fits, and nothing has been freed or added since."""
        if self._stuck is None:
            return False
        available, running, added = self._stuck
        freed = self.pool.num_available > available or len(self.running) < running
        return not freed and added == self._num_added

    def _given_up(self, request: Request) -> bool:
        verdict = self.policy.verdict(request, self.view)
        if verdict == REFUSE:
            seconds = self.gate.retry_after(self.num_waiting)
            message = f"its deadline can no longer be met under this load; try again in {seconds:.0f} s"
            refusal = Refusal(message, RefusalKind.DEADLINE, retry_after=seconds)
            self._end_early(request, FinishReason.ERROR, refusal, queued=False)
        elif verdict != GO:
            request.hopeless = True
            self.waiting.push(request)
        return verdict != GO

    def _stands_aside(self, request: Request, most: int) -> bool:
        """Park a request whose adapter is on its way, if fewer than so many are awaited; end it if that cannot come."""
        tasks, state = self.tasks, self.tasks.state(request.adapter)
        if state == READY or (state == LOADING and len(tasks.parked) >= most and request.adapter not in tasks.parked):
            return False
        if isinstance(state, Refusal):
            self._end_without_adapter(request, state)
        else:
            request.passed_since = self.num_admitted if request.passed_since is None else request.passed_since
            tasks.park(request, self.view.now)
        return True

    def _unpark(self) -> None:
        for request, state in self.tasks.settled(self.view.now):
            if isinstance(state, Refusal):
                self._end_without_adapter(request, state)
            else:
                self._enqueue(request)

    def _end_without_adapter(self, request: Request, why: Refusal) -> None:
        message = f"adapter {request.adapter_name!r}: {why.message}"
        seconds = self.gate.retry_after(self.num_waiting) if why.kind is RefusalKind.UNAVAILABLE else None
        refusal = Refusal(message, why.kind, retry_after=seconds)
        self._end_early(request, FinishReason.ERROR, refusal, queued=False)

    def _prefetch(self) -> None:
        """While the batch is full, the adapters of those who come next are loaded already."""
        while len(self.tasks.parked) < MAX_PREFETCHED:
            request = self.waiting.peek()
            if request is None or self.tasks.state(request.adapter) == READY:
                return
            self.waiting.pop()
            if not self._stands_aside(request, MAX_PREFETCHED):
                self.waiting.push(request)
                return

    def _overdue_adapter(self) -> str | None:
        """The adapter of a parked request that too many have passed: until it is on the device no request with another
        adapter is admitted and no other is fetched, so that room for it comes free."""
        for identity, requests in self.tasks.parked.items():
            if self._passed_too_often(requests[0]):
                return identity
        return None

    def _passed_too_often(self, request: Request) -> bool:
        if request.passed_since is None:
            request.passed_since = self.num_admitted
        return self.num_admitted - request.passed_since >= self.config.max_overtakes

    def _fits(self, request: Request, budget: int, closed_for: str | None) -> list[int] | None:
        """The blocks of its cached prefix if every budget allows it now, else None."""
        identity = request.adapter
        if identity is not None and closed_for not in (None, identity):
            return None
        if self.tasks.state(identity) != READY or not self.tasks.has_room(identity):
            return None
        if request.num_owed:
            return None  # preempted while a step was in flight: its token comes first
        hits = self._prefix(request)
        remaining = len(request.tokens) - len(hits) * self.pool.block_size
        if not self.config.enable_chunked_prefill and remaining > budget:
            return None
        return hits if self._has_memory(request, hits) else None

    def _has_memory(self, request: Request, hits: list[int]) -> bool:
        """Blocks for what it has so far must be free; and a share of everyone's predicted answers must fit too."""
        pool = self.pool
        fresh = self._blocks_for(len(request.tokens)) - len(hits) + pool.num_idle(hits)
        request.num_reserved = fresh
        if not self.running:
            pool.want(fresh, 0, request.adapter)
            return fresh <= pool.num_available
        margin = int(self.config.admission_margin * pool.capacity)
        if fresh + margin > pool.num_available and not pool.want(fresh + margin, 0, request.adapter):
            return False
        # Not before: a prediction is kept, and those who have to wait shall have one that knows more.
        growth = int(self.config.reserve * self.view.lengths.remaining(request)) // pool.block_size
        request.num_reserved += growth
        reserved = self._num_reserved + request.num_reserved
        pool.want(fresh + margin, reserved, request.adapter)
        return reserved <= pool.capacity

    def _prefix(self, request: Request) -> list[int]:
        """Blocks of the longest cached prefix; the last token is always left to compute, for its logits."""
        if not self.cache.enable_prefix_caching or request.prompt_logprobs is not None:
            return []
        self._extend_keys(request)
        return self.pool.match(request.block_keys[: (len(request.tokens) - 1) // self.pool.block_size])

    def _extend_keys(self, request: Request) -> None:
        """Name its full blocks. The root is settled when it is first asked for, and again after a preemption."""
        if not request.root:
            salt = request.tenant if self.cache.isolate_tenants else ""
            request.root = root_key(self.base_version, request.adapter, salt)
        extend_keys(request.block_keys, request.root, request.tokens, self.pool.block_size)

    def set_base_version(self, version: str) -> None:
        """From now on new KV is made with these base weights. The running requests are preempted, as KV of the old
        base is never continued with the new one; they keep their outputs."""
        self.base_version = version
        for request in list(self.running.values()):
            self._preempt(request)
        for request in self.requests.values():
            request.root, request.block_keys = b"", []

    def _start(self, request: Request, hits: list[int], now: float) -> None:
        """From waiting to running: blocks for everything it has so far."""
        self.pool.share(hits)
        request.blocks = hits + self.pool.allocate(self._blocks_for(len(request.tokens)) - len(hits))
        request.num_computed = len(hits) * self.pool.block_size
        request.status = Status.RUNNING
        request.passed_since = request.parked_at = None
        self._num_reserved += request.num_reserved
        self.running[request.id] = request
        self.num_admitted += 1
        self.gate.note_admitted(now, others_wait=len(self.waiting) > 0)
        account = request.account
        account.num_running += 1
        self.ledger.leave_queue(account)
        found = min(request.num_computed, request.num_prompt)
        if found > request.num_charged:
            self.ledger.charge_cached(account, request.num_charged, found)
            request.num_charged = found
        if request.first_scheduled is None:
            request.first_scheduled = now
            request.num_cached = request.num_computed
            request.num_prepaid = self.policy.prepay(request, self.view)
            if request.num_prepaid:
                self.ledger.prepay(account, request.num_prompt, request.num_prepaid)
        if self.tasks.enter(request.adapter):
            self.waiting.touch(request.adapter)  # a task in the batch may move its group forward

    # After the step: what it yielded.

    def commit(self, batch: Batch, result: StepResult, now: float) -> list[Output]:
        """Take a step's tokens; finish what is finished; make full blocks findable."""
        outputs = self.take_outputs()
        sampled = iter(result.sampled)
        running, finished = Status.RUNNING, Status.FINISHED  # a member looked up in its enum costs five attributes
        served: list[Request] = []
        for work in batch.works:
            request = work.request
            token = next(sampled) if work.samples else None
            if work.plain and token and request.status is running and token.token not in request.stop_ids:
                request.tokens.append(token.token)
                served.append(request)
                logprobs = None if token.logprobs is None else [token.logprobs]
                outputs.append(Output(id=request.id, tokens=[token.token], logprobs=logprobs))
            elif request.status is not finished:
                outputs += self._take(work, token, result, now)
        self.ledger.charge_outputs(served)
        self._settle(batch, now)
        return outputs

    def _take(self, work: Work, token: Sampled | None, result: StepResult, now: float) -> list[Output]:
        """What a work that is not plain has yielded."""
        request, end = work.request, work.start + work.num_tokens
        if request.prompt_logprobs is not None:
            _gather(request, work, result)
        if request.status is Status.RUNNING:
            self._publish(request, work.start, end)
            request.prefilled = request.prefilled or work.samples
        if token is not None:
            return [self._accept(request, token, now)]
        if request.limit == end == request.num_prompt:
            return [self._end(request, FinishReason.LENGTH, [], None, None)]
        return []

    def _accept(self, request: Request, sampled: Sampled, now: float) -> Output:
        """One more token of this request."""
        token = sampled.token
        if request.num_owed:
            request.num_owed -= 1
        request.tokens.append(token)
        self.ledger.charge_outputs((request,))
        logprobs = None if sampled.logprobs is None else [sampled.logprobs]
        first = request.first_token is None
        if first:
            request.first_token = now
        stops = token in request.stop_ids and request.num_outputs >= request.params.min_tokens
        if stops and (fault := request.grammar and request.grammar.fault):
            self._close(request, FinishReason.ERROR)
            return Output(id=request.id, tokens=[], finish_reason=FinishReason.ERROR, refusal=Refusal(fault))
        if stops:
            return self._end(request, FinishReason.STOP, [token], logprobs, token, first)
        if len(request.tokens) >= request.limit:
            return self._end(request, FinishReason.LENGTH, [token], logprobs, None, first)
        if first:
            return _first_output(request, [token], logprobs)
        return Output(id=request.id, tokens=[token], logprobs=logprobs)

    def fail(self, batch: Batch, message: str, now: float) -> list[Output]:
        """The step came to nothing: its requests end with an error, everyone else goes on."""
        for work in batch.works:
            if work.request.status is not Status.FINISHED:
                self._end_early(work.request, FinishReason.ERROR, Refusal(message, RefusalKind.FAULT))
        self._settle(batch, now)
        return self.take_outputs()

    def _publish(self, request: Request, start: int, end: int) -> None:
        """Tokens [start, end) are computed: name the blocks that they filled."""
        first, last = start // self.pool.block_size, end // self.pool.block_size
        if self.cache.enable_prefix_caching and first < last:
            if len(request.block_keys) < last:
                self._extend_keys(request)
            self.pool.publish(request.blocks[first:last], request.block_keys[first:last])

    def _settle(self, batch: Batch, now: float) -> None:
        """The step is over: measure the pace, and free what only it could still write."""
        made = next(when for step, when in self._submitted if step == batch.step)
        self._submitted.remove((batch.step, made))
        seconds = now - max(made, self._committed_at)
        self._committed_at = now
        pace = self.view.seconds_per_step
        self.view.seconds_per_step = seconds if pace == 0 else 0.9 * pace + 0.1 * seconds
        oldest = self._submitted[0][0] if self._submitted else self._step + 1
        over = [held for held in self._limbo if held.step < oldest]
        self._limbo = [held for held in self._limbo if held.step >= oldest]
        for held in over:
            self._free(held.blocks, held.adapter)

    # Endings.

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        tokens: list[int],
        logprobs: list[TokenLogprobs] | None,
        stop_token: int | None,
        first: bool = False,
    ) -> Output:
        """A natural end, with its last token."""
        self._close(request, reason)
        if first or request.prompt_logprobs is not None:
            return _first_output(request, tokens, logprobs, reason, stop_token)
        return Output(id=request.id, tokens=tokens, logprobs=logprobs, finish_reason=reason, stop_token=stop_token)

    def _end_early(
        self,
        request: Request,
        reason: FinishReason,
        refusal: Refusal | None = None,
        queued: bool = True,
    ) -> None:
        """An end that no token brought about. `queued`: it may still be in the queue or parked."""
        if request.status is Status.WAITING and not queued:
            self.ledger.leave_queue(request.account)
            request.status = Status.FINISHED
        self._close(request, reason)
        self._outputs.append(Output(id=request.id, tokens=[], finish_reason=reason, refusal=refusal))

    def _close(self, request: Request, reason: FinishReason) -> None:
        before, request.status, request.finish_reason = request.status, Status.FINISHED, reason
        if before is Status.RUNNING:
            self._leave_running(request)
        else:
            self._stuck = None  # whoever was not admitted because this one waited, or was awaited, may fit now
            if before is Status.WAITING:
                self._leave_waiting(request)
        del self.requests[request.id]
        if request.num_prepaid > request.num_outputs:
            account = request.account
            self.ledger.refund_prepaid(account, request.num_prompt, request.num_outputs, request.num_prepaid)
            self.waiting.touch(self.policy.group(request))
        if request.adapter is not None:
            self.adapters.release(request.adapter)
        self.view.lengths.observe(request)

    def _leave_waiting(self, request: Request) -> None:
        self.ledger.leave_queue(request.account)
        if not self.tasks.remove(request):
            self.waiting.discard(request)

    def _leave_running(self, request: Request) -> None:
        del self.running[request.id]
        self._num_reserved -= request.num_reserved
        request.account.num_running -= 1
        self.released.append(request.id)
        self.tasks.leave(request.adapter)
        if request.prefilled:
            self._publish(request, request.num_prompt, len(request.tokens) - 1)  # its answer, for the next turn
        blocks, request.blocks = request.blocks, []
        if self._submitted:
            self._limbo.append(_Limbo(self._step, blocks, request.adapter))
        else:
            self._free(blocks, request.adapter)

    def _free(self, blocks: list[int], adapter: str | None) -> None:
        self.pool.free(blocks)
        if adapter is not None:
            self.adapters.unpin(adapter)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def check_whole(self) -> None:
        """Raise AssertionError unless blocks, queues and counts agree. For tests, and when idle."""
        holders: list[list[int]] = [request.blocks for request in self.running.values()]
        self.pool.check([*holders, *(held.blocks for held in self._limbo)])
        waiting = [r for r in self.requests.values() if r.status is Status.WAITING]
        assert len(waiting) == self.num_waiting
        assert len(self.requests) == len(waiting) + len(self.running)
        assert sum(self.tasks.active.values()) == len(self.running)
        assert sum(a.num_waiting for a in self.ledger.accounts.values()) == len(waiting)
        assert sum(a.num_running for a in self.ledger.accounts.values()) == len(self.running)


def _still_running(works: list[Work]) -> list[Work]:
    """Without those whose request was preempted after it had been given its share of this step."""
    for work in works:
        if work.request.status is not Status.RUNNING and work.samples:
            work.request.num_owed -= 1
    return [work for work in works if work.request.status is Status.RUNNING]


def _gather(request: Request, work: Work, result: StepResult) -> None:
    """Add a step's prompt logprobs; what is known already (recomputed after preemption) is skipped."""
    gathered = request.prompt_logprobs
    assert gathered is not None
    fresh = result.prompt_logprobs.get(request.id, [])[len(gathered) - work.start - 1 :]
    gathered += fresh[: request.num_prompt - len(gathered)]


def _first_output(
    request: Request,
    tokens: list[int],
    logprobs: list[TokenLogprobs] | None,
    reason: FinishReason | None = None,
    stop_token: int | None = None,
) -> Output:
    """What a client learns once, with the first token."""
    prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
    assert request.first_scheduled is not None
    return Output(
        id=request.id,
        tokens=tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=reason,
        stop_token=stop_token,
        num_cached=request.num_cached,
        queue_time=request.first_scheduled - request.arrival,
    )
