"""POST /v1/completions: an answer whole or streamed, and what chat completions share with it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec
from aiohttp import web

from inlaid.engine.request import FinishReason, TokenLogprobs
from inlaid.server import answers
from inlaid.server.access import note_client
from inlaid.server.answers import CompletionLogprobsWriter, TokenCounter
from inlaid.server.bodies import body_size
from inlaid.server.prepare import ClientRequest, completion_request
from inlaid.server.protocol.openai import (
    Completion,
    CompletionBody,
    CompletionChoice,
    CompletionLogprobs,
    GenerateBody,
    Usage,
)
from inlaid.server.service import SERVICE, Service
from inlaid.server.streaming import event, send
from inlaid.text.stream import Answer


def answer(value: object) -> web.Response:
    """Return a value as JSON."""
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


async def completions(request: web.Request, body: CompletionBody) -> web.StreamResponse:
    """Complete prompts, given as text or token ids."""
    service = request.app[SERVICE]
    client = note_client(request, await completion_request(service, body, request.headers, body_size(request)))
    if body.stream:
        return await send(request, _completion_events(service, body, client), service.config.stream_timeout)
    complete = await answers.gather(service, client)
    return await service.offload.run(answers.num_bytes(complete), _completion_answer, service, body, client, complete)


def _completion_answer(
    service: Service, body: CompletionBody, client: ClientRequest, complete: Sequence[Answer]
) -> web.Response:
    choices = [_completion_choice(service, body, client, index, whole) for index, whole in enumerate(complete)]
    usage = answers.usage(client, complete)
    return answer(Completion(id=client.id, created=client.created, model=client.model, choices=choices, usage=usage))


def _completion_choice(
    service: Service, body: CompletionBody, client: ClientRequest, index: int, whole: Answer
) -> CompletionChoice:
    listed = whole.prompt_logprobs if body.prompt_logprobs is not None else None
    return CompletionChoice(
        index=index,
        text=_echo(service, body, client, index) + whole.text,
        logprobs=_completion_logprobs(
            CompletionLogprobsWriter(service.tokenizer, bool(body.return_tokens_as_token_ids)),
            body,
            client,
            index,
            whole.prompt_logprobs,
            whole.logprobs,
        ),
        finish_reason=reason(whole.finish_reason),
        stop_reason=whole.stop_reason,
        prompt_logprobs=msgspec.UNSET if listed is None else answers.prompt_logprobs(service.tokenizer, listed),
        token_ids=whole.tokens if body.return_token_ids else msgspec.UNSET,
        prompt_token_ids=client.prompt_of(index) if body.return_token_ids else msgspec.UNSET,
    )


def _echo(service: Service, body: CompletionBody, client: ClientRequest, index: int) -> str:
    if not body.echo:
        return ""
    text = client.text_of(index)
    return service.tokenizer.decode(client.prompt_of(index)) if text is None else text


def _completion_logprobs(
    writer: CompletionLogprobsWriter,
    body: CompletionBody,
    client: ClientRequest,
    index: int,
    prompt_logprobs: list[TokenLogprobs | None] | None,
    logprobs: list[TokenLogprobs] | None,
) -> CompletionLogprobs | None:
    if body.logprobs is None:
        return None
    echoed = (prompt_logprobs or []) if body.echo else []
    return writer.write([*echoed, *(logprobs or ())], client.prompt_of(index)[0])


async def _completion_events(
    service: Service, body: CompletionBody, client: ClientRequest
) -> AsyncGenerator[bytes, None]:
    counter = TokenCounter(client)
    writers = [
        CompletionLogprobsWriter(service.tokenizer, bool(body.return_tokens_as_token_ids)) for _ in client.requests
    ]
    started: set[int] = set()

    def chunk(choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> bytes:
        return event(Completion(id=client.id, created=client.created, model=client.model, choices=choices, usage=usage))

    async with aclosing(answers.all_pieces(service, client)) as arriving:
        async for index, piece in arriving:
            counter.add(index, len(piece.tokens), piece.num_cached)
            first = index not in started
            started.add(index)
            if not (piece.text or piece.logprobs or piece.finish_reason or first or body.return_token_ids):
                continue
            choice = CompletionChoice(
                index=index,
                text=(_echo(service, body, client, index) if first else "") + piece.text,
                logprobs=_completion_logprobs(
                    writers[index], body, client, index, piece.prompt_logprobs, piece.logprobs
                ),
                finish_reason=reason(piece.finish_reason),
                stop_reason=piece.stop_reason,
                token_ids=piece.tokens if body.return_token_ids else msgspec.UNSET,
            )
            yield chunk([choice], running_usage(body, counter))
    if wants_usage(body):
        yield chunk([], counter.usage())


def reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value


def wants_usage(body: GenerateBody) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def running_usage(body: GenerateBody, counter: TokenCounter) -> Usage | msgspec.UnsetType | None:
    """Return the usage that a chunk carries: the running one on request; null where only the last chunk has it, as
    OpenAI does."""
    options = body.stream_options
    if options is None or not (options.include_usage or options.continuous_usage_stats):
        return msgspec.UNSET
    return counter.usage() if options.continuous_usage_stats else None
