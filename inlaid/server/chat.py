"""POST /v1/chat/completions: a conversation's answer with its reasoning and tool calls, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec
from aiohttp import web

from inlaid.engine.request import TokenLogprobs
from inlaid.server import answers
from inlaid.server.access import note_client
from inlaid.server.answers import TokenCounter
from inlaid.server.bodies import body_size
from inlaid.server.completions import answer, running_usage, wants_usage
from inlaid.server.conversation import chat_request
from inlaid.server.prepare import ClientRequest
from inlaid.server.protocol.chat import (
    CallDelta,
    CalledFunction,
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    Delta,
    FunctionDelta,
    MadeCall,
)
from inlaid.server.protocol.openai import Usage
from inlaid.server.reading import Reader, read_pieces, read_whole
from inlaid.server.service import SERVICE, Service
from inlaid.server.streaming import event, send
from inlaid.text.stream import Answer, Piece
from inlaid.text.tools.events import Arguments, Call, Event, Reasoning, Text


async def chat_completions(request: web.Request, body: ChatBody) -> web.StreamResponse:
    """Answer a conversation, written out by the model's chat template."""
    service = request.app[SERVICE]
    client = note_client(request, await chat_request(service, body, request.headers, body_size(request)))
    if body.stream:
        return await send(request, _events(service, body, client), service.config.stream_timeout)
    complete = await answers.gather(service, client)
    return await service.offload.run(answers.num_bytes(complete), _answer, service, body, client, complete)


def _answer(service: Service, body: ChatBody, client: ClientRequest, complete: Sequence[Answer]) -> web.Response:
    listed = complete[0].prompt_logprobs
    return answer(
        ChatCompletion(
            id=client.id,
            created=client.created,
            model=client.model,
            choices=[_choice(service, body, client, index, whole) for index, whole in enumerate(complete)],
            usage=answers.usage(client, complete),
            prompt_logprobs=None if listed is None else answers.prompt_logprobs(service.tokenizer, listed),
            prompt_token_ids=client.prompt_of(0) if body.return_token_ids else msgspec.UNSET,
        )
    )


def _choice(service: Service, body: ChatBody, client: ClientRequest, index: int, whole: Answer) -> ChatChoice:
    reader = read_whole(client.form, whole.text)
    return ChatChoice(
        index=index,
        message=_message(body, reader),
        logprobs=_logprobs(service, body, whole.logprobs),
        finish_reason=reader.reason(whole.finish_reason),
        stop_reason=whole.stop_reason,
        token_ids=whole.tokens if body.return_token_ids else msgspec.UNSET,
    )


def _message(body: ChatBody, reader: Reader) -> ChatMessage:
    read = reader.answer
    calls = [
        MadeCall(id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments)) for call in read.calls
    ]
    return ChatMessage(
        content=None if calls and not read.text.strip() else read.text,
        reasoning_content=read.reasoning if _shows(body, read.reasoning) else msgspec.UNSET,
        tool_calls=calls or msgspec.UNSET,
    )


def _shows(body: ChatBody, reasoning: str) -> bool:
    return bool(reasoning) and body.include_reasoning is not False


def _logprobs(service: Service, body: ChatBody, logprobs: list[TokenLogprobs] | None) -> ChatLogprobs | None:
    if not body.logprobs:
        return None
    return answers.chat_logprobs(service.tokenizer, logprobs or [], bool(body.return_tokens_as_token_ids))


async def _events(service: Service, body: ChatBody, client: ClientRequest) -> AsyncGenerator[bytes, None]:
    counter = TokenCounter(client)
    readers = [Reader(client.form) for _ in client.requests]
    started: set[int] = set()

    def chunk(choices: list[ChunkChoice], usage: Usage | msgspec.UnsetType | None) -> bytes:
        return event(ChatChunk(id=client.id, created=client.created, model=client.model, choices=choices, usage=usage))

    async with aclosing(read_pieces(service, client, readers)) as arriving:
        async for index, piece, read in arriving:
            counter.add(index, len(piece.tokens), piece.num_cached)
            usage = running_usage(body, counter)
            if index not in started:
                started.add(index)
                yield chunk([ChunkChoice(index=index, delta=Delta(role="assistant", content=""))], usage)
            if read or piece.logprobs or piece.finish_reason or body.return_token_ids:
                yield chunk([_chunk_choice(service, body, index, piece, readers[index], read)], usage)
    if wants_usage(body):
        yield chunk([], counter.usage())


def _chunk_choice(
    service: Service, body: ChatBody, index: int, piece: Piece, reader: Reader, read: Sequence[Event]
) -> ChunkChoice:
    ended = piece.finish_reason is not None
    return ChunkChoice(
        index=index,
        delta=_delta(body, reader, read),
        logprobs=_logprobs(service, body, piece.logprobs),
        finish_reason=reader.reason(piece.finish_reason),
        stop_reason=piece.stop_reason if ended else msgspec.UNSET,
        token_ids=piece.tokens if body.return_token_ids else msgspec.UNSET,
    )


def _delta(body: ChatBody, reader: Reader, read: Sequence[Event]) -> Delta:
    """Return the events of one piece as one change."""
    delta, calls = Delta(), dict[int, CallDelta]()
    for one in read:
        match one:
            case Text():
                delta.content = (delta.content or "") + one.text
            case Reasoning() if _shows(body, one.text):
                delta.reasoning_content = (delta.reasoning_content or "") + one.text
            case Call():
                function = FunctionDelta(name=one.name, arguments="")
                made = reader.answer.calls[one.index]
                calls[one.index] = CallDelta(index=one.index, id=made.id, type="function", function=function)
            case Arguments():
                more = calls.setdefault(one.index, CallDelta(index=one.index, function=FunctionDelta(arguments="")))
                more.function.arguments += one.text
    if calls:
        delta.tool_calls = list(calls.values())
    return delta
