"""From engine outputs to answers: each answer's pieces of text, several answers side by side, and their logprobs in
OpenAI's two shapes. The completion and chat routes are made of these.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from inlaid.engine.request import FinishReason, TokenLogprobs
from inlaid.server.prepare import Job
from inlaid.server.protocol import (
    CachedTokens,
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
    Usage,
)
from inlaid.server.service import Service
from inlaid.text.tokenizer import Piece, TextStream, Tokenizer
from inlaid.worker.client import NotNow, RequestRefused

_LEAST_LOGPROB = -9999.0  # JSON has no infinity
_QUEUED_PIECES = 256


async def pieces(service: Service, job: Job, index: int) -> AsyncGenerator[Piece, None]:
    """One answer as it comes, metered. The last piece has a finish_reason."""
    request = job.requests[index]
    stream = TextStream(service.tokenizer, request.prompt, request.params)
    meter = service.metrics.meter(request)
    try:
        async with aclosing(service.engine.generate(request, service.config.request_timeout)) as outputs:
            async for output in outputs:
                piece = stream.take(output)
                meter.note(piece)
                yield piece
                if piece.finish_reason is not None:
                    if output.finish_reason is None:
                        service.engine.stop(request.id)
                    return
    except RequestRefused as error:
        meter.refuse(400 if error.retry_after is None else 429)
        raise
    except NotNow:
        meter.refuse(503)
        raise
    finally:
        meter.close()


async def all_pieces(service: Service, job: Job) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all answers as they come, each with its answer's index."""
    if len(job.requests) == 1:
        async with aclosing(pieces(service, job, 0)) as only:
            async for piece in only:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue(_QUEUED_PIECES)
    tasks = [asyncio.create_task(_pump(service, job, index, queue)) for index in range(len(job.requests))]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    service: Service, job: Job, index: int, queue: asyncio.Queue[tuple[int, Piece] | Exception | None]
) -> None:
    try:
        async with aclosing(pieces(service, job, index)) as mine:
            async for piece in mine:
                await queue.put((index, piece))
        await queue.put(None)
    except Exception as error:  # noqa: BLE001 - raised again where the queue is read
        await queue.put(error)


@dataclass
class Whole:
    """An answer gathered to its end."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached: int = 0

    def add(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs or ()
        self.prompt_logprobs = self.prompt_logprobs or piece.prompt_logprobs
        self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason
        self.num_cached = max(self.num_cached, piece.num_cached)


async def gather(service: Service, job: Job) -> list[Whole]:
    """All answers, complete."""
    wholes = [Whole() for _ in job.requests]
    async with aclosing(all_pieces(service, job)) as arriving:
        async for index, piece in arriving:
            wholes[index].add(piece)
    return wholes


class Counter:
    """Usage: each prompt counted once, every answer's tokens."""

    def __init__(self, job: Job) -> None:
        self._prompt = sum(len(prompt.tokens) for prompt in job.prompts)
        self._num_answers = job.num_answers
        self._cached: dict[int, int] = {}  # per prompt, by its first answer
        self._completion = 0

    def add(self, index: int, num_tokens: int, num_cached: int) -> None:
        self._completion += num_tokens
        if index % self._num_answers == 0:
            prompt = index // self._num_answers
            self._cached[prompt] = max(self._cached.get(prompt, 0), num_cached)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=self._completion,
            total_tokens=self._prompt + self._completion,
            prompt_tokens_details=CachedTokens(cached_tokens=sum(self._cached.values())),
        )


def usage(job: Job, wholes: Sequence[Whole]) -> Usage:
    counter = Counter(job)
    for index, whole in enumerate(wholes):
        counter.add(index, len(whole.tokens), whole.num_cached)
    return counter.usage()


class CompletionLogprobsWriter:
    """Logprobs of one answer in the completions shape; remembers where in the text it is."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def write(self, listed: Sequence[TokenLogprobs | None], first_token: int = 0) -> CompletionLogprobs:
        """`None` stands for a prompt's first token, which nothing predicts."""
        made = CompletionLogprobs()
        for item in listed:
            text = self._tokenizer.token_text(first_token if item is None else item.token)
            made.tokens.append(text)
            made.token_logprobs.append(None if item is None else finite(item.logprob))
            made.top_logprobs.append(None if item is None else self._top(item))
            made.text_offset.append(self._offset)
            self._offset += len(text)
        return made

    def _top(self, item: TokenLogprobs) -> dict[str, float]:
        """By text. Of tokens with the same text the likelier counts."""
        top: dict[str, float] = {}
        for token, logprob in [*item.top, (item.token, item.logprob)]:
            text = self._tokenizer.token_text(token)
            top[text] = max(top.get(text, _LEAST_LOGPROB), finite(logprob))
        return top


def chat_logprobs(tokenizer: Tokenizer, listed: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """Logprobs in the chat shape."""

    def entry(token: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=tokenizer.token_text(token), logprob=finite(logprob), bytes=list(tokenizer.token_bytes(token))
        )

    content = []
    for item in listed:
        own = entry(item.token, item.logprob)
        top = [entry(token, logprob) for token, logprob in item.top]
        content.append(ChatLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
    return ChatLogprobs(content=content)


def prompt_logprobs(tokenizer: Tokenizer, listed: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
    """vLLM's shape: per position a dict from token id."""
    return [None if item is None else _by_token(tokenizer, item) for item in listed]


def _by_token(tokenizer: Tokenizer, item: TokenLogprobs) -> dict[int, PromptLogprob]:
    made = {
        token: PromptLogprob(logprob=finite(value), rank=rank, decoded_token=tokenizer.token_text(token))
        for rank, (token, value) in enumerate(item.top, start=1)
    }
    made[item.token] = PromptLogprob(
        logprob=finite(item.logprob), rank=item.rank, decoded_token=tokenizer.token_text(item.token)
    )
    return made


def finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
