"""The scheduler: what each step computes, and what becomes of its tokens.

The engine is the only caller: add and abort at any moment, then schedule and commit once per step; with an
overlapping runner schedule runs one step ahead of commit. A policy says who goes first; the budgets are kept here,
once, for all policies. The parts, each in a file: admission, decodes, delivery, endings. They share a State, and only
they write to the requests, the block pool and the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from inlaid.config import CacheConfig, SchedulerConfig
from inlaid.engine.admission import Admission
from inlaid.engine.decodes import Decodes
from inlaid.engine.delivery import Delivery
from inlaid.engine.endings import Endings
from inlaid.engine.intake import check_config, make_cost, make_request, most_tokens
from inlaid.engine.kv_cache import BlockPool
from inlaid.engine.ledger import Ledger
from inlaid.engine.limits import QueueLimits
from inlaid.engine.policy import Inlaid, Lengths, MaxTokens, Policy, Rpm, View, parse_policy
from inlaid.engine.prefix import PrefixCache
from inlaid.engine.progress import Progress
from inlaid.engine.refusal import Refusal, RefusalKind, Refused
from inlaid.engine.request import (
    Batch,
    FinishReason,
    NewRequest,
    Output,
    Request,
    Status,
    StepResult,
    TokenLogprobs,
    Work,
)
from inlaid.engine.residency import AdapterDirectory
from inlaid.engine.seniority import Seniority
from inlaid.engine.speculation import Speculation
from inlaid.engine.state import State
from inlaid.engine.step_log import StepLog
from inlaid.engine.step_time import StepTime
from inlaid.engine.steps import Steps
from inlaid.engine.waiting import WaitingQueue
from inlaid.engine.working_set import WorkingSet


class Scheduler:
    """Owner of the requests, their order, and the pool of KV blocks."""

    admission_type: type[Admission] = Admission  # an experiment may admit in another way

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
        speculation: Speculation | None = None,
    ) -> None:
        check_config(config)
        self.config = config
        self.cache = cache
        self.max_model_len = max_model_len
        self.eos_ids = frozenset(eos_ids)
        self.adapters = adapters
        self.pool = pool or BlockPool(num_blocks, cache.block_size)
        self.ledger = Ledger(make_cost(config))
        self.limits = QueueLimits(config.max_num_waiting)
        working_set = WorkingSet(adapters, config.max_sum_of_ranks, max_adapter_wait)
        self.view = View(self.ledger, lengths or MaxTokens(), active=working_set.active)
        self.view.tokens_per_step = config.max_num_batched_tokens
        self.state = State(
            config=config,
            adapters=adapters,
            pool=self.pool,
            prefix=PrefixCache(cache, self.pool, base_version),
            steps=Steps(self.pool, adapters),
            step_time=StepTime(config.max_step_ms / 1000),
            ledger=self.ledger,
            limits=self.limits,
            working_set=working_set,
            view=self.view,
            waiting=WaitingQueue(parse_policy(config.policy), self.view),
            speculation=speculation,
        )
        self.view.running = self.state.running
        self.endings = Endings(self.state)
        self.decodes = Decodes(self.state, self.endings)
        self.delivery = Delivery(self.state, self.endings)
        self.admission = self.admission_type(self.state, self.decodes, self.endings)
        self.step_log = StepLog(adapters.rank)
        self.admitting = True  # False while running requests drain: none starts
        self._num_added = 0
        self.set_policy(self.policy)

    # What can be seen.

    @property
    def policy(self) -> Policy:
        return self.state.policy

    @property
    def requests(self) -> dict[str, Request]:
        """All requests that have not ended, by id; a copy."""
        return {request_id: progress.request for request_id, progress in self.state.progress.items()}

    @property
    def num_running(self) -> int:
        return len(self.state.running)

    @property
    def num_waiting(self) -> int:
        return self.state.num_waiting

    @property
    def num_preemptions(self) -> int:
        return self.state.num_preemptions

    @property
    def active_adapters(self) -> int:
        """Adapters, the base left out, that the running requests use."""
        return sum(identity is not None for identity in self.state.working_set.active)

    @property
    def has_work(self) -> bool:
        return bool(self.state.progress or self.endings.has_outputs)

    # Arrival and departure.

    def set_policy(self, policy: Policy) -> None:
        """Change the order from the next step on; no request is dropped."""
        state = self.state
        state.working_set.max_adapters = self.config.max_tasks_per_step
        state.working_set.beta = policy.beta if isinstance(policy, Inlaid) else 0
        state.nothing_fits = None
        state.waiting.reorder(policy)
        watched = state.progress.values() if policy.seniority_s < math.inf else ()
        state.seniority = Seniority(progress.request for progress in watched)

    def add(self, new: NewRequest, now: float) -> Request:
        """Queue a request, or raise Refused."""
        state = self.state
        if new.id in state.progress:
            raise Refused(Refusal(f"request id {new.id!r} is in use"))
        limit = most_tokens(new, self.max_model_len, self.pool, self.config)
        account = self.ledger.account(new.tenant)
        rpm = self.policy if isinstance(self.policy, Rpm) else None
        self.limits.check(account, self.num_waiting, self.ledger.num_backlogged, now)
        if rpm is not None:
            self.limits.check_rate(new.tenant, rpm.limit, rpm.window, now)
        identity = self._resolve(new.adapter)
        self._num_added += 1
        request = make_request(new, identity, account, limit, now, self._num_added, self.eos_ids)
        scored = new.params.prompt_logprobs is not None
        charged = len(new.prompt) if new.made else 0
        prompt_logprobs: list[TokenLogprobs | None] | None = [None] if scored else None
        state.progress[request.id] = Progress(request, prompt_logprobs, charged)
        self.limits.note_accepted(new.tenant, now, None if rpm is None else rpm.window)
        account.num_requests += 1
        self.ledger.enter_queue(account)
        state.enqueue(request)
        return request

    def _resolve(self, name: str | None) -> str | None:
        try:
            return None if name is None else self.adapters.resolve(name)
        except ValueError as error:
            raise Refused(Refusal(str(error), RefusalKind.NOT_FOUND)) from error

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT, num_tokens: int | None = None) -> bool:
        """End a request now, whatever it is doing. Return False if it is unknown or has ended already.

        With `num_tokens` its answer has only so many output tokens: a stop string was found. Those that came after are
        not charged, even if the request has ended already, and are no part of the length that the predictor learns.
        """
        if num_tokens is not None:
            self.endings.stop(request_id, num_tokens)
        progress = self.state.progress.get(request_id)
        if progress is not None:
            self.endings.end_early(progress, reason)
        return progress is not None

    def preempt(self, request_id: str) -> None:
        """Make a running request wait again; it keeps its outputs and computes its KV anew."""
        self.endings.preempt(self.state.running[request_id])

    def begun(self) -> frozenset[str]:
        """Return the ids of requests that run, or have output from an earlier run."""
        progress = self.state.progress.items()
        return frozenset(i for i, p in progress if p.request.status is Status.RUNNING or p.request.num_outputs)

    def set_base_version(self, version: str, staying: Collection[str] = ()) -> None:
        """Make new KV with other base weights from now on. Requests that stay go on with the old weights and their KV,
        and name their blocks by the old version. Other running requests are preempted, as KV of the old base is never
        continued with the new one; they keep their outputs."""
        for request_id, progress in self.state.progress.items():
            if request_id in staying:
                self.state.prefix.settle(progress)
        self.state.prefix.base_version = version
        for request_id, progress in list(self.state.running.items()):
            if request_id not in staying:
                self.endings.preempt(progress)
        for request_id, progress in self.state.progress.items():
            if request_id not in staying:
                self.state.prefix.forget(progress)

    # A step.

    def schedule(self, now: float) -> Batch | None:
        """Return the next step's batch, or None if nothing can be computed now."""
        self.view.now = now
        self.ledger.note(now)
        self.admission.promote()
        if self.admitting:
            self.admission.free_a_seat()
        preemptions = self.num_preemptions
        singles, prefills, budget = self.decodes.schedule()
        if self.admitting:
            self.admission.recall()
            if self.num_preemptions == preemptions:
                for work in self.admission.admit(budget):
                    (singles if work.num_tokens == 1 else prefills).append(work)
            self.admission.fetch()
        if not singles and not prefills:
            return None
        step, speculation = self.state.steps.begin(now), self.state.speculation
        if speculation is not None and singles:
            singles, prefills = self._with_drafts(speculation, singles, prefills)
            speculation.begun(step)
        return Batch(step, (*singles, *prefills), self.endings.take_released())

    def _with_drafts(
        self, speculation: Speculation, singles: list[Work], prefills: list[Work]
    ) -> tuple[list[Work], list[Work]]:
        """Give decodes drafts from what the step's works leave of its tokens, of which it samples max_num_seqs at most;
        works with one are longer ones."""
        tokens = self.config.max_num_batched_tokens - len(singles) - sum(work.num_tokens for work in prefills)
        budget = min(tokens, self.config.max_num_seqs - len(singles) - len(prefills))
        singles, drafted = self.decodes.draft(speculation, singles, budget)
        return singles, drafted + prefills

    def note_submitted(self, batch: Batch, now: float) -> None:
        """Note that the device has been given a step: the host is free for the next."""
        self.state.host_share += self.state.steps.submitted(batch.step, now) / len(batch.works)

    def commit(self, batch: Batch, result: StepResult, now: float) -> list[Output]:
        """Take a step's tokens; finish what is finished; free what only this step could still write."""
        before = self.ledger.num_output_tokens
        outputs = self.take_outputs() + self.delivery.deliver(batch.works, result, now)
        self._end_step(batch, now, self.ledger.num_output_tokens - before)
        return outputs

    def still_running(self, batch: Batch) -> list[Work]:
        """Return the works of a failed step that are worth running again. The token that the step should have brought a
        preempted request is forgotten: the request computes it anew."""
        for work in batch.works:
            if work.request.status is Status.WAITING and work.samples:
                self.state.progress[work.request.id].num_pending = 0
        return [work for work in batch.works if work.request.status is Status.RUNNING]

    def end_failed(self, request: Request, message: str) -> None:
        """End a request whose step failed on it alone."""
        progress = self.state.progress[request.id]
        self.endings.end_early(progress, FinishReason.ERROR, Refusal(message, RefusalKind.FAULT))

    def end_not_finite(self, request_ids: Collection[str]) -> bool:
        """End requests whose logits are not finite, each alone. Return True if a running one is to be computed again:
        then no step in flight may hold it."""
        found = [self.state.progress[request_id] for request_id in request_ids if request_id in self.state.progress]
        again = [self.endings.end_not_finite(progress) for progress in found]
        return any(again)

    def _end_step(self, batch: Batch, now: float, num_made: int) -> None:
        load = self.step_log.measure(batch)
        timing = self.state.steps.end(batch.step, now)
        seconds = timing.seconds
        self.step_log.note(load, timing)
        if not self.has_work:
            self.state.steps.rest()
        self.state.step_time.note(batch.works, seconds)
        if self.state.speculation is not None:
            self.state.speculation.note_step(batch, timing.busy, timing.overlapped)
            seconds /= max(1.0, num_made / max(1, len(batch.works)))  # policies count in steps of one token
        pace = self.view.seconds_per_step
        self.view.seconds_per_step = seconds if pace == 0 else 0.9 * pace + 0.1 * seconds

    def take_outputs(self) -> list[Output]:
        """Take the ends that happened between steps (aborts, refusals)."""
        return self.endings.take_outputs()

    def check_whole(self) -> None:
        """Raise AssertionError unless blocks, queues and counts agree. For tests, and when idle."""
        state = self.state
        holders = [progress.request.blocks for progress in state.running.values()]
        self.pool.check([*holders, *state.steps.deferred_blocks])
        waiting = [p for p in state.progress.values() if p.request.status is Status.WAITING]
        accounts = self.ledger.accounts.values()
        assert len(waiting) == self.num_waiting
        assert len(state.progress) == len(waiting) + len(state.running)
        assert sum(state.working_set.active.values()) == len(state.running)
        assert sum(a.num_waiting for a in accounts) == len(waiting)
        assert sum(a.num_running for a in accounts) == len(state.running)
