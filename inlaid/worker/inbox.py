"""The outputs of one request on their way from the engine process to their reader."""

from __future__ import annotations

import asyncio

import msgspec

from inlaid.engine.refusal import Refusal, Refused
from inlaid.engine.request import Output
from inlaid.worker.errors import RequestTimeout

_MAX_UNREAD = 250_000  # tokens and log probabilities of one answer that its reader has not taken
_UNREAD = f"the answer is not read: more than {_MAX_UNREAD} tokens and log probabilities of it wait"


class Inbox:
    """Outputs of one request. What is not read yet is kept as one Output, so that a slow reader costs no more than the
    tokens of its answer."""

    def __init__(self) -> None:
        self._output: Output | None = None
        self._num_unread = 0  # tokens and log probabilities in it, from so many outputs
        self._num_outputs = 0
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        """Add what the engine has just made."""
        self._num_unread += num_entries(output)
        self._output = output if self._output is None else merge(self._output, output)
        if self._num_unread > _MAX_UNREAD and self._num_outputs:
            self._output, self._error = None, Refused(Refusal(_UNREAD))
        self._num_outputs += 1
        self._wake()

    def fail(self, error: Exception) -> None:
        """Let the reader raise an error."""
        self._error = error
        self._wake()

    async def get(self) -> Output:
        """Return the next output. An error comes first, unless the answer is complete already."""
        while self._output is None or (self._error is not None and self._output.finish_reason is None):
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        output, self._output = self._output, None
        self._num_unread = self._num_outputs = 0
        return output

    def fail_after(self, seconds: float) -> asyncio.TimerHandle:
        """Fail with RequestTimeout after some seconds, unless the timer is cancelled."""
        error = RequestTimeout(f"the request was not done within the {seconds:g} s that this server allows")
        return asyncio.get_running_loop().call_later(seconds, self.fail, error)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def num_entries(output: Output) -> int:
    """Count the tokens of an output and its log probabilities."""
    listed = (*(output.logprobs or ()), *(output.prompt_logprobs or ()))
    return len(output.tokens) + sum(1 + len(item.top) for item in listed if item is not None)


def merge(first: Output, second: Output) -> Output:
    """Join two consecutive outputs of one request."""
    logprobs = first.logprobs
    if second.logprobs is not None:
        logprobs = [*(first.logprobs or []), *second.logprobs]
    return msgspec.structs.replace(
        first,
        tokens=first.tokens + second.tokens,
        logprobs=logprobs,
        prompt_logprobs=second.prompt_logprobs if first.prompt_logprobs is None else first.prompt_logprobs,
        finish_reason=second.finish_reason,
        stop_token=second.stop_token,
        num_cached=max(first.num_cached, second.num_cached),
        queue_time=second.queue_time if first.queue_time is None else first.queue_time,
        adapter_time=max(first.adapter_time, second.adapter_time),
        adapter_read=max(first.adapter_read, second.adapter_read),
        adapter_copy=max(first.adapter_copy, second.adapter_copy),
        host_time=first.host_time + second.host_time,
        refusal=second.refusal,
    )
