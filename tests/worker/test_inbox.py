"""Outputs on their way: merged while nobody reads, up to a limit."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from inlaid.engine.refusal import Refused
from inlaid.engine.request import FinishReason, Output, TokenLogprobs
from inlaid.worker.inbox import Inbox, merge


def logprobs(token: int, num_top: int = 0) -> list[TokenLogprobs]:
    return [TokenLogprobs(token, -1.0, 1, [(n, -1.0) for n in range(num_top)])]


def test_outputs_merge_into_one() -> None:
    first = Output(id="a", tokens=[1], logprobs=logprobs(1), prompt_logprobs=[None], num_cached=3, queue_time=0.5)
    first = msgspec.structs.replace(first, adapter_time=0.25)
    second = Output(id="a", tokens=[2, 3], logprobs=logprobs(2), finish_reason=FinishReason.STOP, stop_token=3)
    assert merge(first, second) == Output(
        id="a",
        tokens=[1, 2, 3],
        logprobs=logprobs(1) + logprobs(2),
        prompt_logprobs=[None],
        num_cached=3,
        queue_time=0.5,
        adapter_time=0.25,
        finish_reason=FinishReason.STOP,
        stop_token=3,
    )


def test_an_answer_that_is_not_read_is_ended_before_it_fills_memory() -> None:
    async def main() -> None:
        read, unread = Inbox(), Inbox()
        for token in range(3000):
            output = Output(id="a", tokens=[token], logprobs=logprobs(token, 100))
            read.put(output)
            assert await read.get() == output
            unread.put(output)
        with pytest.raises(Refused, match="the answer is not read"):
            await unread.get()

    asyncio.run(main())


def test_one_output_of_any_size_can_be_read() -> None:
    async def main() -> None:
        inbox = Inbox()
        large = Output(id="a", tokens=[1], prompt_logprobs=[None, *(logprobs(1, 100) * 5000)])
        inbox.put(large)
        assert await inbox.get() == large

    asyncio.run(main())
