"""Delivery: what a request makes of the tokens that a step brought it."""

from __future__ import annotations

from collections.abc import Sequence

from inlaid.engine.endings import Endings
from inlaid.engine.progress import Progress
from inlaid.engine.refusal import Refusal
from inlaid.engine.request import FinishReason, Output, Request, Sampled, Status, StepResult, TokenLogprobs, Work
from inlaid.engine.state import State


class Delivery:
    """Turn sampled tokens into outputs, and end the requests that are complete."""

    def __init__(self, state: State, endings: Endings) -> None:
        self._state = state
        self._endings = endings

    def deliver(self, works: tuple[Work, ...], result: StepResult, now: float) -> list[Output]:
        """Take a step's tokens. A plain decode, which is nearly every work, is looked at for its token only."""
        outputs: list[Output] = []
        tokens: Sequence[Sampled | None] = result.sampled
        if len(tokens) < len(works):
            sampled = iter(result.sampled)
            tokens = [next(sampled) if work.samples else None for work in works]
        running, finished = Status.RUNNING, Status.FINISHED  # a member looked up in its enum costs five attributes
        served: list[Request] = []
        for work, token in zip(works, tokens):
            request = work.request
            if work.plain and token is not None and request.status is running and token.token not in request.stop_ids:
                request.tokens.append(token.token)
                served.append(request)
                logprobs = None if token.logprobs is None else [token.logprobs]
                outputs.append(Output(id=request.id, tokens=[token.token], logprobs=logprobs))
            elif request.status is not finished and request.id not in result.not_finite:
                outputs += self._take(self._state.progress[request.id], work, token, result, now)
        self._state.ledger.charge_outputs(served)
        return outputs

    def _take(
        self, progress: Progress, work: Work, token: Sampled | None, result: StepResult, now: float
    ) -> list[Output]:
        """Take what a work that is not plain has yielded."""
        request, end = work.request, work.start + work.num_tokens
        if progress.prompt_logprobs is not None:
            _gather(progress.prompt_logprobs, work, result)
        if work.draft and token is not None:
            return [self._accept_draft(progress, work, token, now)]
        if request.status is Status.RUNNING:
            self._state.prefix.publish(progress, work.start, end)
            progress.prefilled = progress.prefilled or work.samples
        if token is not None:
            return [self._accept(progress, token, now)]
        if request.limit == end == request.num_prompt:
            self._endings.close(progress, FinishReason.LENGTH)
            return [_first_output(progress, [], None, FinishReason.LENGTH)]
        return []

    def _accept_draft(self, progress: Progress, work: Work, sampled: Sampled, now: float) -> Output:
        """Add the tokens of a work with a draft, up to the one that ends the request. The KV behind the last guess that
        was right is never read: its positions are computed again. No block with such a position is published."""
        request, speculation = progress.request, self._state.speculation
        if speculation is not None:
            speculation.note_accepted(work, len(sampled.following))
        made = [self._accept(progress, sampled, now)]
        for one in sampled.following:
            if made[-1].finish_reason is not None:
                break
            made.append(self._accept(progress, one, now))
        progress.drafted = False
        if request.status is Status.RUNNING:
            progress.num_computed = work.start + len(made)
            self._state.prefix.publish(progress, work.start, progress.num_computed)
        return made[0] if len(made) == 1 else _merged(made)

    def _accept(self, progress: Progress, sampled: Sampled, now: float) -> Output:
        """Add a token to its request, and end the request if that was the last."""
        request, token = progress.request, sampled.token
        if progress.num_pending:
            progress.num_pending -= 1
        request.tokens.append(token)
        self._state.ledger.charge_outputs((request,))
        first = progress.first_token is None
        if first:
            progress.first_token = now
        reason = _end_of(request, token)
        fault: str | None = request.grammar.fault if reason is FinishReason.STOP and request.grammar else None
        if fault:
            self._endings.close(progress, FinishReason.ERROR)
            return Output(id=request.id, tokens=[], finish_reason=FinishReason.ERROR, refusal=Refusal(fault))
        if reason is not None:
            self._endings.close(progress, reason)
        logprobs = None if sampled.logprobs is None else [sampled.logprobs]
        stop_token = token if reason is FinishReason.STOP else None
        if first or (reason and progress.prompt_logprobs is not None):
            return _first_output(progress, [token], logprobs, reason, stop_token)
        return Output(
            id=request.id,
            tokens=[token],
            logprobs=logprobs,
            finish_reason=reason,
            stop_token=stop_token,
            host_time=progress.host_time if reason is not None else 0.0,
        )


def _merged(made: Sequence[Output]) -> Output:
    """Return the outputs of one step for one request as one: what comes once is in the first or in the last."""
    first, last = made[0], made[-1]
    logprobs = [one for output in made for one in output.logprobs or ()]
    return Output(
        id=first.id,
        tokens=[token for output in made for token in output.tokens],
        logprobs=None if first.logprobs is None else logprobs,
        prompt_logprobs=first.prompt_logprobs or last.prompt_logprobs,
        finish_reason=last.finish_reason,
        stop_token=last.stop_token,
        num_cached=first.num_cached,
        queue_time=first.queue_time,
        adapter_time=first.adapter_time,
        adapter_read=first.adapter_read,
        adapter_copy=first.adapter_copy,
        host_time=last.host_time,
        refusal=last.refusal,
    )


def _end_of(request: Request, token: int) -> FinishReason | None:
    """Return why a request ends with its newest token, or None if it goes on."""
    if token in request.stop_ids and request.num_outputs >= request.params.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(request.tokens) >= request.limit else None


def _gather(gathered: list[TokenLogprobs | None], work: Work, result: StepResult) -> None:
    """Add a step's prompt logprobs; what is known already (recomputed after preemption) is skipped."""
    request = work.request
    fresh = result.prompt_logprobs.get(request.id, [])[len(gathered) - work.start - 1 :]
    gathered += fresh[: request.num_prompt - len(gathered)]


def _first_output(
    progress: Progress,
    tokens: list[int],
    logprobs: list[TokenLogprobs] | None,
    reason: FinishReason | None = None,
    stop_token: int | None = None,
) -> Output:
    """Make the output that carries what a client learns once, with the first token."""
    request = progress.request
    prompt_logprobs, progress.prompt_logprobs = progress.prompt_logprobs, None
    assert progress.first_scheduled is not None
    return Output(
        id=request.id,
        tokens=tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=reason,
        stop_token=stop_token,
        num_cached=progress.num_cached,
        queue_time=progress.first_scheduled - request.arrival,
        adapter_time=progress.adapter_time,
        adapter_read=progress.adapter_read,
        adapter_copy=progress.adapter_copy,
        host_time=progress.host_time if reason is not None else 0.0,
    )
