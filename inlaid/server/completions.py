"""POST /v1/completions and /v1/chat/completions: the two shapes of an answer, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from aiohttp import web

from inlaid.engine.request import FinishReason, TokenLogprobs
from inlaid.server import answers
from inlaid.server.answers import CompletionLogprobsWriter, Counter, Whole
from inlaid.server.prepare import Job, chat_job, completion_job
from inlaid.server.protocol import (
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    Completion,
    CompletionBody,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    GenerateBody,
    Usage,
)
from inlaid.server.service import SERVICE, Service
from inlaid.server.streaming import event, send
from inlaid.text.tokenizer import Piece


def answer(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


async def completions(request: web.Request, body: CompletionBody) -> web.StreamResponse:
    """Complete prompts, given as text or token ids."""
    service = request.app[SERVICE]
    job = await completion_job(service, body, request.headers)
    if body.stream:
        return await send(request, _completion_events(service, body, job))
    wholes = await answers.gather(service, job)
    choices = [_completion_choice(service, body, job, index, whole) for index, whole in enumerate(wholes)]
    usage = answers.usage(job, wholes)
    return answer(Completion(id=job.id, created=job.created, model=job.target.name, choices=choices, usage=usage))


async def chat_completions(request: web.Request, body: ChatBody) -> web.StreamResponse:
    """Answer a conversation, written out by the model's chat template."""
    service = request.app[SERVICE]
    job = await chat_job(service, body, request.headers)
    if body.stream:
        return await send(request, _chat_events(service, body, job))
    wholes = await answers.gather(service, job)
    listed = wholes[0].prompt_logprobs
    return answer(
        ChatCompletion(
            id=job.id,
            created=job.created,
            model=job.target.name,
            choices=[_chat_choice(service, body, index, whole) for index, whole in enumerate(wholes)],
            usage=answers.usage(job, wholes),
            prompt_logprobs=None if listed is None else answers.prompt_logprobs(service.tokenizer, listed),
            prompt_token_ids=job.prompts[0].tokens if body.return_token_ids else msgspec.UNSET,
        )
    )


# Completions


def _completion_choice(service: Service, body: CompletionBody, job: Job, index: int, whole: Whole) -> CompletionChoice:
    listed = whole.prompt_logprobs if body.prompt_logprobs is not None else None
    return CompletionChoice(
        index=index,
        text=_echo(service, body, job, index) + "".join(whole.text),
        logprobs=_completion_logprobs(
            CompletionLogprobsWriter(service.tokenizer), body, job, index, whole.prompt_logprobs, whole.logprobs
        ),
        finish_reason=_reason(whole.finish_reason),
        stop_reason=whole.stop_reason,
        prompt_logprobs=msgspec.UNSET if listed is None else answers.prompt_logprobs(service.tokenizer, listed),
        token_ids=whole.tokens if body.return_token_ids else msgspec.UNSET,
        prompt_token_ids=job.prompt_of(index).tokens if body.return_token_ids else msgspec.UNSET,
    )


def _echo(service: Service, body: CompletionBody, job: Job, index: int) -> str:
    if not body.echo:
        return ""
    prompt = job.prompt_of(index)
    return service.tokenizer.decode(prompt.tokens) if prompt.text is None else prompt.text


def _completion_logprobs(
    writer: CompletionLogprobsWriter,
    body: CompletionBody,
    job: Job,
    index: int,
    prompt_logprobs: list[TokenLogprobs | None] | None,
    logprobs: list[TokenLogprobs] | None,
) -> CompletionLogprobs | None:
    if body.logprobs is None:
        return None
    echoed = (prompt_logprobs or []) if body.echo else []
    return writer.write([*echoed, *(logprobs or ())], job.prompt_of(index).tokens[0])


async def _completion_events(service: Service, body: CompletionBody, job: Job) -> AsyncGenerator[bytes, None]:
    counter = Counter(job)
    writers = [CompletionLogprobsWriter(service.tokenizer) for _ in job.requests]
    started: set[int] = set()

    def chunk(choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> bytes:
        return event(Completion(id=job.id, created=job.created, model=job.target.name, choices=choices, usage=usage))

    async with aclosing(answers.all_pieces(service, job)) as arriving:
        async for index, piece in arriving:
            counter.add(index, len(piece.tokens), piece.num_cached)
            first = index not in started
            started.add(index)
            if not (piece.text or piece.logprobs or piece.finish_reason or first or body.return_token_ids):
                continue
            choice = CompletionChoice(
                index=index,
                text=(_echo(service, body, job, index) if first else "") + piece.text,
                logprobs=_completion_logprobs(writers[index], body, job, index, piece.prompt_logprobs, piece.logprobs),
                finish_reason=_reason(piece.finish_reason),
                stop_reason=piece.stop_reason,
                token_ids=piece.tokens if body.return_token_ids else msgspec.UNSET,
            )
            yield chunk([choice], _running_usage(body, counter))
    if _wants_usage(body):
        yield chunk([], counter.usage())


# Chat


def _chat_choice(service: Service, body: ChatBody, index: int, whole: Whole) -> ChatChoice:
    return ChatChoice(
        index=index,
        message=ChatMessage(content="".join(whole.text)),
        logprobs=_chat_logprobs(service, body, whole.logprobs),
        finish_reason=_reason(whole.finish_reason),
        stop_reason=whole.stop_reason,
        token_ids=whole.tokens if body.return_token_ids else msgspec.UNSET,
    )


def _chat_logprobs(service: Service, body: ChatBody, logprobs: list[TokenLogprobs] | None) -> ChatLogprobs | None:
    return answers.chat_logprobs(service.tokenizer, logprobs or []) if body.logprobs else None


async def _chat_events(service: Service, body: ChatBody, job: Job) -> AsyncGenerator[bytes, None]:
    counter = Counter(job)
    started: set[int] = set()

    def chunk(choices: list[ChunkChoice], usage: Usage | msgspec.UnsetType | None) -> bytes:
        return event(ChatChunk(id=job.id, created=job.created, model=job.target.name, choices=choices, usage=usage))

    async with aclosing(answers.all_pieces(service, job)) as arriving:
        async for index, piece in arriving:
            counter.add(index, len(piece.tokens), piece.num_cached)
            usage = _running_usage(body, counter)
            if index not in started:
                started.add(index)
                yield chunk([ChunkChoice(index=index, delta=Delta(role="assistant", content=""))], usage)
            if piece.text or piece.logprobs or piece.finish_reason or body.return_token_ids:
                yield chunk([_chunk_choice(service, body, index, piece)], usage)
    if _wants_usage(body):
        yield chunk([], counter.usage())


def _chunk_choice(service: Service, body: ChatBody, index: int, piece: Piece) -> ChunkChoice:
    ended = piece.finish_reason is not None
    return ChunkChoice(
        index=index,
        delta=Delta(content=piece.text) if piece.text or not ended else Delta(),
        logprobs=_chat_logprobs(service, body, piece.logprobs),
        finish_reason=_reason(piece.finish_reason),
        stop_reason=piece.stop_reason if ended else msgspec.UNSET,
        token_ids=piece.tokens if body.return_token_ids else msgspec.UNSET,
    )


def _reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value


def _wants_usage(body: GenerateBody) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _running_usage(body: GenerateBody, counter: Counter) -> Usage | msgspec.UnsetType | None:
    """In every chunk on request; null in each but the last when usage is wanted, as OpenAI does."""
    options = body.stream_options
    if options is None or not (options.include_usage or options.continuous_usage_stats):
        return msgspec.UNSET
    return counter.usage() if options.continuous_usage_stats else None
