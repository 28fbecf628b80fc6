"""Answers made of engine outputs: the pieces of each answer, several answers side by side, and their log probabilities
in OpenAI's two shapes. The completion and chat routes are made of these.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from inlaid.engine.refusal import Refused
from inlaid.engine.request import TokenLogprobs
from inlaid.server.errors import BadRequest, refused
from inlaid.server.prepare import ClientRequest
from inlaid.server.protocol.chat import ChatLogprob, ChatLogprobs, TopLogprob
from inlaid.server.protocol.openai import CachedTokens, CompletionLogprobs, PromptLogprob, PromptLogprobs, Usage
from inlaid.server.service import Service
from inlaid.text.params import MAX_LOGPROB_ENTRIES
from inlaid.text.stream import Answer, Piece, TextStream
from inlaid.text.tokenizer import Tokenizer

_LEAST_LOGPROB = -9999.0  # JSON has no infinity
_QUEUED_PIECES = 256
_LOGPROB_BYTES = 32  # of one as JSON, about


async def pieces(service: Service, client: ClientRequest, index: int) -> AsyncGenerator[Piece, None]:
    """Yield one answer as it comes, metered. The last piece has a finish_reason."""
    request = client.requests[index]
    stream = TextStream(service.tokenizer, request.prompt, request.params)
    meter = service.metrics.meter(request)
    try:
        async with aclosing(service.engine.generate(request, service.config.request_timeout)) as outputs:
            async for output in outputs:
                piece = stream.take(output)
                meter.note(piece)
                client.outcome.note(piece, index % client.num_answers == 0)
                yield piece
                if piece.finish_reason is not None:
                    if stream.stopped is not None:
                        service.engine.stop(request.id, stream.num_tokens)
                    return
    except Refused as error:
        meter.refuse(refused(error.refusal).status)
        raise
    finally:
        meter.close()


async def all_pieces(service: Service, client: ClientRequest) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield the pieces of all answers as they come, each with its answer's index."""
    if len(client.requests) == 1:
        async with aclosing(pieces(service, client, 0)) as only:
            async for piece in only:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue(_QUEUED_PIECES)
    tasks = [asyncio.create_task(_pump(service, client, index, queue)) for index in range(len(client.requests))]
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
    service: Service, client: ClientRequest, index: int, queue: asyncio.Queue[tuple[int, Piece] | Exception | None]
) -> None:
    try:
        async with aclosing(pieces(service, client, index)) as mine:
            async for piece in mine:
                await queue.put((index, piece))
        await queue.put(None)
    except Exception as error:  # noqa: BLE001 - raised again where the queue is read
        await queue.put(error)


async def gather(service: Service, client: ClientRequest) -> list[Answer]:
    """Return all answers, complete."""
    answers = [Answer() for _ in client.requests]
    budget = LogprobBudget()
    async with aclosing(all_pieces(service, client)) as arriving:
        async for index, piece in arriving:
            answers[index].add(piece)
            budget.spend(piece)
    return answers


def num_bytes(complete: Sequence[Answer]) -> int:
    """Estimate the size of answers as JSON, from their log probabilities, which are nearly all of a large one."""
    items = (item for one in complete for item in (*(one.prompt_logprobs or ()), *(one.logprobs or ())))
    return _LOGPROB_BYTES * sum(1 + len(item.top) for item in items if item is not None)


class LogprobBudget:
    """The log probabilities that the server may hold for one request of a client."""

    def __init__(self) -> None:
        self._left = MAX_LOGPROB_ENTRIES

    def spend(self, piece: Piece) -> None:
        """Count a piece that is kept."""
        self._left -= sum(1 + len(item.top) for item in piece.logprobs or ())
        if self._left < 0:
            text = f"the answer has more than {MAX_LOGPROB_ENTRIES} log probabilities; ask for fewer, or for less text"
            raise BadRequest(text, "logprobs")


class TokenCounter:
    """Token counts of a client's request: each prompt once, and every answer."""

    def __init__(self, client: ClientRequest) -> None:
        self._prompt = sum(len(request.prompt) for request in client.requests[:: client.num_answers])
        self._num_answers = client.num_answers
        self._cached: dict[int, int] = {}  # per prompt, by its first answer
        self._completion = 0

    def add(self, index: int, num_tokens: int, num_cached: int) -> None:
        """Count tokens of an answer."""
        self._completion += num_tokens
        if index % self._num_answers == 0:
            prompt = index // self._num_answers
            self._cached[prompt] = max(self._cached.get(prompt, 0), num_cached)

    def usage(self) -> Usage:
        """Return the counts so far."""
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=self._completion,
            total_tokens=self._prompt + self._completion,
            prompt_tokens_details=CachedTokens(cached_tokens=sum(self._cached.values())),
        )


def usage(client: ClientRequest, answers: Sequence[Answer]) -> Usage:
    """Return the usage of complete answers."""
    counter = TokenCounter(client)
    for index, answer in enumerate(answers):
        counter.add(index, len(answer.tokens), answer.num_cached)
    return counter.usage()


class CompletionLogprobsWriter:
    """Log probabilities of one answer in the shape of completions; it keeps the place in the text."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self._text_of = token_namer(tokenizer, as_ids)
        self._offset = 0

    def write(self, listed: Sequence[TokenLogprobs | None], first_token: int = 0) -> CompletionLogprobs:
        """Return the log probabilities of the next tokens. `None` stands for a prompt's first token, which nothing
        predicts."""
        made = CompletionLogprobs()
        for item in listed:
            text = self._text_of(first_token if item is None else item.token)
            made.tokens.append(text)
            made.token_logprobs.append(None if item is None else finite(item.logprob))
            made.top_logprobs.append(None if item is None else self._top(item))
            made.text_offset.append(self._offset)
            self._offset += len(text)
        return made

    def _top(self, item: TokenLogprobs) -> dict[str, float]:
        """Return the top tokens by their text. Of tokens with the same text the likelier counts."""
        top: dict[str, float] = {}
        for token, logprob in [*item.top, (item.token, item.logprob)]:
            text = self._text_of(token)
            top[text] = max(top.get(text, _LEAST_LOGPROB), finite(logprob))
        return top


def token_namer(tokenizer: Tokenizer, as_ids: bool) -> Callable[[int], str]:
    """Return the function that names a token in log probabilities: by its text, or as vLLM does by its id."""
    return (lambda token: f"token_id:{token}") if as_ids else tokenizer.token_text


def chat_logprobs(tokenizer: Tokenizer, listed: Sequence[TokenLogprobs], as_ids: bool = False) -> ChatLogprobs:
    """Return log probabilities in the shape of chat completions."""
    text_of = token_namer(tokenizer, as_ids)

    def entry(token: int, logprob: float) -> TopLogprob:
        return TopLogprob(token=text_of(token), logprob=finite(logprob), bytes=list(tokenizer.token_bytes(token)))

    content = []
    for item in listed:
        own = entry(item.token, item.logprob)
        top = [entry(token, logprob) for token, logprob in item.top]
        content.append(ChatLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
    return ChatLogprobs(content=content)


def prompt_logprobs(tokenizer: Tokenizer, listed: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
    """Return a prompt's log probabilities in vLLM's shape: for each position a dict from token id."""
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
    """Return a log probability that JSON can hold."""
    return max(logprob, _LEAST_LOGPROB)
