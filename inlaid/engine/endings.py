"""Preemption and endings: how a request stops running, and what is given back."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from inlaid.engine.account import Account
from inlaid.engine.progress import Progress
from inlaid.engine.refusal import Refusal, RefusalKind
from inlaid.engine.request import FinishReason, Output, Status
from inlaid.engine.state import State

MAX_ENDED = 4096  # requests remembered in which a stop string may still be found


@dataclass(frozen=True, slots=True)
class _Ended:
    """The charges of a request that has ended."""

    account: Account
    num_prompt: int
    num_outputs: int


class Endings:
    """Take requests out of the batch or out of the engine."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.released: list[str] = []  # ended or preempted since the last batch, which the next one tells the runner
        self._outputs: list[Output] = []  # ends that no step brought about
        self._ended: OrderedDict[str, _Ended] = OrderedDict()  # the latest with stop strings, see stop

    @property
    def has_outputs(self) -> bool:
        return bool(self._outputs)

    def take_outputs(self) -> list[Output]:
        """Take the ends that happened between steps (aborts, refusals)."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_released(self) -> tuple[str, ...]:
        """Take the ids of those whose place in the runner may be reused."""
        released, self.released = tuple(self.released), []
        return released

    def preempt(self, progress: Progress) -> None:
        """Give up a running request's KV; it waits again, keeps its outputs, and computes everything anew."""
        state, request = self._state, progress.request
        state.num_preemptions += 1
        request.num_preemptions += 1
        self._leave_running(progress)
        progress.num_pending = progress.num_inflight
        progress.num_computed = progress.decode_until = 0
        progress.prefilled = progress.drafted = False
        request.status = Status.WAITING
        state.ledger.enter_queue(request.account, lift=False)
        state.enqueue(request)

    def end_early(self, progress: Progress, reason: FinishReason, refusal: Refusal | None = None) -> None:
        """End a request for a reason that is not in its tokens. Its Output comes with the next step's."""
        self.close(progress, reason)
        self._outputs.append(
            Output(
                id=progress.request.id,
                tokens=[],
                finish_reason=reason,
                refusal=refusal,
                host_time=progress.host_time,
            )
        )

    def end_not_finite(self, progress: Progress) -> bool:
        """End a request whose logits are not finite. One that uses KV of another request may not be at fault: it waits
        again, to compute all its KV itself. Return True for such a one."""
        request, again = progress.request, progress.shares_prefix
        if request.status is Status.WAITING:  # preempted since the step began
            progress.uncached, progress.num_pending = True, 0
            return False
        self._state.prefix.withdraw(progress)
        if again:
            progress.uncached = True
            self.preempt(progress)
            progress.num_pending = 0  # what steps in flight bring it is void too
        else:
            who = "the base" if request.adapter is None else f"adapter {request.adapter_name!r}"
            text = f"{who} computes numbers for this text that are not finite: it overflows the compute type"
            self.end_early(progress, FinishReason.ERROR, Refusal(text, RefusalKind.FAULT))
        return again

    def refuse(self, progress: Progress, refusal: Refusal) -> None:
        """End a request that was just taken out of the queue."""
        self._state.ledger.leave_queue(progress.request.account)
        progress.request.status = Status.FINISHED
        self.end_early(progress, FinishReason.ERROR, refusal)

    def stop(self, request_id: str, num_tokens: int) -> None:
        """Take back the tokens that steps brought after the answer's text had ended, `num_tokens` output tokens in:
        they are not charged. The request may have ended by itself meanwhile, if it has stop strings."""
        state, progress = self._state, self._state.progress.get(request_id)
        if progress is not None:
            request = progress.request
            ended = _Ended(request.account, request.num_prompt, request.num_outputs)
            prepaid = state.ledger.prepaid(request)
        elif request_id in self._ended:
            ended, prepaid = self._ended.pop(request_id), 0
        else:
            return
        if 0 <= num_tokens < ended.num_outputs:
            first = num_tokens + 1
            state.ledger.refund_outputs(ended.account, ended.num_prompt, first, ended.num_outputs, prepaid)
            state.waiting.touch(ended.account.tenant)  # its counter fell
            if progress is not None:
                del progress.request.tokens[ended.num_prompt + num_tokens :]

    def close(self, progress: Progress, reason: FinishReason) -> None:
        """Give back everything that a request holds."""
        state, request = self._state, progress.request
        before, request.status, request.finish_reason = request.status, Status.FINISHED, reason
        if before is Status.RUNNING:
            self._leave_running(progress)
        else:
            state.nothing_fits = None  # a request that waited because of this one may fit now
            if before is Status.WAITING:
                self._leave_waiting(progress)
        del state.progress[request.id]
        if state.ledger.settle(request):
            state.waiting.touch(state.policy.group(request))
        if request.params.stop and reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._ended[request.id] = _Ended(request.account, request.num_prompt, request.num_outputs)
            if len(self._ended) > MAX_ENDED:
                self._ended.popitem(last=False)
        if request.adapter is not None:
            state.adapters.release(request.adapter)
        state.view.lengths.observe(request)
        if state.speculation is not None:
            state.speculation.end(request)

    def _leave_waiting(self, progress: Progress) -> None:
        state = self._state
        state.ledger.leave_queue(progress.request.account)
        if not state.working_set.remove(progress):
            state.waiting.discard(progress.request)

    def _leave_running(self, progress: Progress) -> None:
        state, request = self._state, progress.request
        del state.running[request.id]
        progress.host_time += state.host_share - progress.host_since
        state.num_reserved -= progress.num_reserved
        state.ledger.leave_batch(request.account)
        self.released.append(request.id)
        state.working_set.leave(request.adapter)
        if progress.prefilled:
            # The answer, for the next turn of a chat.
            state.prefix.publish(progress, request.num_prompt, len(request.tokens) - 1)
        blocks, request.blocks = request.blocks, []
        state.steps.release(blocks, request.adapter)
