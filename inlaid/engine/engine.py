"""The step loop: schedule, submit, collect, commit. The engine process, LLM and the simulator call it.

The engine owns nothing on the device: the runner does, behind a protocol. With an overlapping runner the host makes
step n+1 while the device computes step n. A step that raises is run again by halves, so that only the requests end
that it fails on, see recovery.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from inlaid.config import EngineConfig, SchedulerConfig
from inlaid.engine.control import change, describe, fairness
from inlaid.engine.explain import queue, service_history
from inlaid.engine.kv_cache import SCRATCH, BlockPool
from inlaid.engine.policy import Lengths, MaxTokens
from inlaid.engine.predictor import Predictor
from inlaid.engine.recovery import PROBE, probe, recover
from inlaid.engine.refusal import Refusal, Refused
from inlaid.engine.request import Batch, FinishReason, Grammar, NewRequest, Output, Request, Runner, StepResult
from inlaid.engine.residency import AdapterDirectory, NoAdapters
from inlaid.engine.scheduler import Scheduler
from inlaid.engine.sizes import StepSizes
from inlaid.engine.speculation import make_speculation

log = logging.getLogger(__name__)

_MAX_NAMED = 8  # requests that a log line names


class Engine:
    """One scheduler and one runner, stepped together."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        clock: Callable[[], float],
        make_grammar: Callable[[Grammar], Any] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.clock = clock
        self.num_failures = 0  # steps that raised
        self.num_failures_in_a_row = 0  # of them with no request that went well
        self.idle = True  # the last step neither gave the runner work nor took any from it
        self._make_grammar = make_grammar
        self._pending: tuple[Batch, Any] | None = None
        self._settled: list[Output] = []  # outputs of a step that was collected early
        self._num_steps = 0
        self._num_tokens = 0
        self._sizes = StepSizes()

    def add(self, new: NewRequest) -> Request:
        """Queue a request, or raise Refused."""
        grammar = None
        if new.params.grammar is not None:
            if self._make_grammar is None:
                message = "structured output needs llguidance: pip install 'llguidance>=1.3,<2'"
                raise Refused(Refusal(message))
            try:
                grammar = self._make_grammar(new.params.grammar)
            except ValueError as error:
                raise Refused(Refusal(str(error))) from error
        request = self.scheduler.add(new, self.clock())
        request.grammar = grammar
        return request

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT, num_tokens: int | None = None) -> bool:
        """End a request at once; its last Output comes with the next step. Return False if it is unknown or over.

        STOP says that the answer is whole (a stop string was found), so that the predictor learns its length. With
        `num_tokens` the answer has only so many output tokens: those after them are not charged, even if the request
        has ended by itself before the stop string was found.
        """
        return self.scheduler.abort(request_id, reason, num_tokens)

    @property
    def has_work(self) -> bool:
        return self._pending is not None or bool(self._settled) or self.scheduler.has_work

    def step(self) -> list[Output]:
        """Take one turn of the loop and return its outputs.

        If there is nothing to compute (adapters still loading, say), `idle` is set, so that the caller can pause
        instead of spinning.
        """
        if self._settled:
            outputs, self._settled = self._settled, []
            return outputs
        batch = self.scheduler.schedule(self.clock())
        current = failure = None
        if batch is not None:
            try:
                current = (batch, self.runner.submit(batch))
                self.scheduler.note_submitted(batch, self.clock())
            except Exception as error:  # noqa: BLE001 - whatever is raised ends requests, not the server
                failure = (batch, error)
        if self.runner.overlap:
            current, self._pending = self._pending, current
        self.idle = batch is None and current is None
        outputs = self._collect(*current) if current is not None else []
        if failure is not None:
            outputs += self._recover(*failure)
        return outputs + self.scheduler.take_outputs()

    def settle(self) -> None:
        """Collect the step in flight, if there is one: nothing runs on the device then. Its outputs come with the next
        step."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._settled += self._collect(*pending)

    def _collect(self, batch: Batch, ticket: Any) -> list[Output]:
        try:
            result = self.runner.collect(ticket)
        except Exception as error:  # noqa: BLE001 - as in step
            following, self._pending = self._pending, None
            if following is not None:
                self._discard(following[1])
            outputs = self._recover(batch, error)
            return outputs + (self._recover(following[0], None) if following is not None else [])
        again = self.scheduler.end_not_finite(result.not_finite)
        if again and (following := self._pending) is not None:
            self._pending = None
            self._discard(following[1])  # it went on with a token that there is not
            return self._commit(batch, result) + self._recover(following[0], None)
        return self._commit(batch, result)

    def _commit(self, batch: Batch, result: StepResult) -> list[Output]:
        self.num_failures_in_a_row = 0
        self._num_steps += 1
        self._num_tokens += batch.num_tokens
        self._sizes.add(batch.num_tokens)
        return self.scheduler.commit(batch, result, self.clock())

    def _discard(self, ticket: Any) -> None:
        """Wait for a step whose results are not valid, as the step before it failed."""
        try:
            self.runner.collect(ticket)
        except Exception as error:  # noqa: BLE001 - it is run again, and fails again if the fault is its own
            log.warning("the step behind a failed one failed too: %r", error)

    def _recover(self, batch: Batch, error: Exception | None) -> list[Output]:
        """Run the works of a failed step again, or those of the step behind it (`error` is None), so that only the
        requests end whose work fails alone."""
        if error is not None:
            log.error("step %d of %d requests failed", batch.step, len(batch.works), exc_info=error)
        recovered = recover(self.runner, batch, self.scheduler.still_running(batch), error)
        if error is not None or recovered.failed:
            self.num_failures += 1
        if recovered.failed:
            names = ", ".join(work.request.id for work, _ in recovered.failed[:_MAX_NAMED])
            log.error("step %d failed on %d requests: %s", batch.step, len(recovered.failed), names)
        for work, fault in recovered.failed:
            self.scheduler.end_failed(work.request, f"the step failed: {type(fault).__name__}: {fault}")
        rest = replace(batch, works=tuple(recovered.works))
        self.scheduler.end_not_finite(recovered.not_finite)
        if recovered.works:
            return self._commit(rest, replace(recovered.result, not_finite=tuple(recovered.not_finite)))
        self.num_failures_in_a_row += bool(recovered.failed)
        return self.scheduler.commit(rest, recovered.result, self.clock())

    def probe(self) -> Exception | None:
        """Look whether the device works, after steps that failed on each of their requests; return why it does not.
        While a step is in flight, that step will tell."""
        scheduler = self.scheduler
        if self._pending is not None:
            return None
        block = scheduler.pool.take() if scheduler.pool.num_available else SCRATCH
        fault = probe(self.runner, block)
        if block != SCRATCH:
            scheduler.pool.free([block])
        scheduler.endings.released.append(PROBE)
        if fault is None:
            log.warning(
                "%d steps in a row failed; the device works, so their requests were at fault",
                self.num_failures_in_a_row,
            )
            self.num_failures_in_a_row = 0
        return fault

    def close(self) -> None:
        """Save the predictor if the configuration names a file for it."""
        lengths, path = self.scheduler.view.lengths, self.scheduler.config.predictor_file
        if isinstance(lengths, Predictor) and path:
            lengths.save(Path(path))

    # Viewed and changed while it runs.

    def stats(self) -> dict[str, float]:
        """Return gauges and counters for /metrics."""
        scheduler = self.scheduler
        pool = scheduler.pool
        ledger = scheduler.ledger
        return {
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "kv_blocks": pool.capacity,
            "kv_blocks_used": pool.capacity - pool.num_available,
            "kv_blocks_cached": pool.num_cached,
            "kv_blocks_lent": pool.num_lent,
            "adapters_running": scheduler.active_adapters,
            "preemptions": scheduler.num_preemptions,
            "steps": self._num_steps,
            "step_seconds": scheduler.step_log.seconds,
            "step_tokens": self._num_tokens,
            **self._sizes.stats(),
            "failures": self.num_failures,
            "prompt_tokens": ledger.num_prompt_tokens,
            "cached_tokens": ledger.num_cached_tokens,
            "output_tokens": ledger.num_output_tokens,
            **({} if scheduler.state.speculation is None else scheduler.state.speculation.stats()),
        }

    def describe_scheduler(self) -> dict[str, Any]:
        """Answer GET /v1/scheduler."""
        return describe(self.scheduler)

    def set_scheduler(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Answer PUT /v1/scheduler: change any of policy, options, weights, limits and max_num_waiting, and return the
        new description. A bad value raises ValueError, and nothing is changed."""
        change(self.scheduler, changes)
        return describe(self.scheduler)

    def fairness(self, window: float = 60.0) -> dict[str, Any]:
        """Answer GET /v1/fairness: each tenant's service in the last `window` seconds, and the tenants that wait."""
        return fairness(self.scheduler, window, self.clock())

    def queue(self, most: int = 20) -> list[dict[str, Any]]:
        """Return the first requests that wait, in the policy's order, each with the reason why it stands there."""
        return queue(self.scheduler, most, self.clock())

    def service_history(self, seconds: float, pace: float) -> dict[str, Any]:
        """Return the service of each tenant in the last `seconds`, summed over pieces of `pace` seconds."""
        return service_history(self.scheduler, seconds, pace, self.clock())


def make_engine(
    config: EngineConfig,
    runner: Runner,
    clock: Callable[[], float],
    *,
    num_blocks: int,
    max_model_len: int,
    adapters: AdapterDirectory | None = None,
    eos_ids: Collection[int] = (),
    base_version: str = "",
    make_grammar: Callable[[Grammar], Any] | None = None,
    pool: BlockPool | None = None,
) -> Engine:
    """Make an engine from its configuration and the figures of the model and the device's memory."""
    scheduler = Scheduler(
        config.scheduler,
        config.cache,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        adapters=adapters or NoAdapters(),
        eos_ids=eos_ids,
        lengths=make_lengths(config.scheduler),
        base_version=base_version,
        max_adapter_wait=config.adapters.adapter_timeout,
        pool=pool,
        speculation=make_speculation(config.speculation),
    )
    return Engine(scheduler, runner, clock, make_grammar)


def make_lengths(config: SchedulerConfig) -> Lengths:
    """Make the predictor that a configuration names, with what it learned before."""
    if config.predictor == "none":
        return MaxTokens()
    if config.predictor != "history":
        raise ValueError(f"unknown predictor {config.predictor!r}; known: history, none")
    path = Path(config.predictor_file)
    return Predictor.load(path) if config.predictor_file and path.exists() else Predictor()
