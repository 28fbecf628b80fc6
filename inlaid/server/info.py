"""The routes about the server itself: models, tokens, health, metrics, version."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from inlaid import __version__
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.server.bodies import body_size
from inlaid.server.completions import answer
from inlaid.server.conversation import chat_tokens, template_options
from inlaid.server.errors import BadRequest, NotFound, Unavailable
from inlaid.server.protocol.admin import AdapterState
from inlaid.server.protocol.info import (
    DetokenizeBody,
    Detokenized,
    Health,
    ModelCard,
    ModelList,
    TokenizeBody,
    Tokens,
    Version,
)
from inlaid.server.protocol.sglang import ModelSummary
from inlaid.server.service import SERVICE, Service
from inlaid.text.tokenizer import TooManyTokens
from inlaid.worker.errors import EngineDead
from inlaid.worker.interface import ReplicaState, ServingEngine
from inlaid.worker.messages import AdapterInfo

_SILENCE = 5.0  # seconds without an answer after which the engine is not asked, or not waited for
_PATIENCE = 30.0  # seconds that the engine may take to make a token
_MAX_IDS = 131_072  # for /tokenize and /detokenize: longer lists hold the interpreter's lock
_Asked = TypeVar("_Asked")


def _base_card(request: web.Request) -> ModelCard:
    service = request.app[SERVICE]
    return ModelCard(
        id=service.names.base,
        created=service.started,
        root=service.root(request.headers),
        max_model_len=service.encoder.max_model_len,
    )


def _adapter_cards(request: web.Request, adapters: Iterable[AdapterInfo], heard: bool) -> list[ModelCard]:
    """Return a card for each adapter, with its state if that was heard just now."""
    service = request.app[SERVICE]
    paths = service.keys.opens_paths(request.headers)
    return [
        ModelCard(
            id=info.name,
            created=service.started,
            root=info.path if paths else info.name,
            parent=service.names.base,
            max_model_len=service.encoder.max_model_len,
            adapter=msgspec.convert(info, AdapterState, from_attributes=True) if heard else msgspec.UNSET,
        )
        for info in adapters
    ]


async def models(request: web.Request) -> web.Response:
    """List the base and its adapters, each a model."""
    engine = request.app[SERVICE].engine
    adapters = await _ask(engine, engine.list_adapters)
    listed = _adapter_cards(request, engine.adapters.values(), adapters is not None)
    return answer(ModelList(data=[_base_card(request), *listed]))


async def model(request: web.Request) -> web.Response:
    """Describe one model."""
    service = request.app[SERVICE]
    name = service.names.adapter_in(request.match_info["name"])
    if name == service.names.base:
        return answer(_base_card(request))
    known = service.engine.adapters.get(name)
    if known is None:
        raise NotFound(f"model {name!r} does not exist here", "model", "model_not_found")
    try:
        now = await _ask(service.engine, partial(service.engine.describe_adapter, name))
    except ValueError:
        raise NotFound(f"model {name!r} has just been unloaded", "model", "model_not_found") from None
    return answer(*_adapter_cards(request, [now or known], now is not None))


async def _ask(engine: ServingEngine, ask: Callable[[], Awaitable[_Asked]]) -> _Asked | None:
    """Return the engine process's answer; None: it is not there, or busy for too long."""
    if engine.seconds_silent > _SILENCE:
        return None
    try:
        return await asyncio.wait_for(ask(), _SILENCE)
    except (EngineDead, asyncio.TimeoutError):
        return None


async def tokenize(request: web.Request, body: TokenizeBody) -> web.Response:
    """Return the token ids of a text, or of a conversation through the chat template."""
    service = request.app[SERVICE]
    service.resolve(body.model)
    run = service.offload.run if body.messages is None else service.offload.run_chat
    return await run(body_size(request), _tokens, service, body)


def _tokens(service: Service, body: TokenizeBody) -> web.Response:
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("give either prompt or messages")
    if body.messages is not None:
        tokens = chat_tokens(service, body.messages, body.tools, template_options(body), bool(body.add_special_tokens))
    else:
        special = True if body.add_special_tokens is None else body.add_special_tokens
        tokens = _encoded(service, body.prompt or "", special)
    texts = [service.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    most = service.encoder.max_model_len
    return answer(Tokens(count=len(tokens), max_model_len=most, tokens=tokens, token_strs=texts))


def _encoded(service: Service, text: str, special: bool) -> list[int]:
    most = _most_ids(service)
    if len(text) > most * service.tokenizer.max_token_bytes:
        raise BadRequest(f"prompt has {len(text)} characters; at most {most} tokens are listed", "prompt")
    try:
        return service.tokenizer.encode(text, special, most)
    except TooManyTokens as error:
        raise BadRequest(f"prompt has {error} tokens; at most {most} are listed", "prompt") from None


def _most_ids(service: Service) -> int:
    return max(_MAX_IDS, service.encoder.max_model_len)


async def detokenize(request: web.Request, body: DetokenizeBody) -> web.Response:
    """Return the text of token ids, special tokens included."""
    service = request.app[SERVICE]
    service.resolve(body.model)
    if len(body.tokens) > (most := _most_ids(service)):
        raise BadRequest(f"tokens has {len(body.tokens)} entries; at most {most} are turned into text", "tokens")
    return await service.offload.run(body_size(request), _text, service, body.tokens)


def _text(service: Service, tokens: list[int]) -> web.Response:
    service.encoder.tokens(tokens, "tokens")
    return answer(Detokenized(prompt=service.tokenizer.decode(tokens, skip_special_tokens=False)))


async def health(request: web.Request) -> web.Response:
    """Answer 200 while the engine process serves."""
    service = request.app[SERVICE]
    engine, most = service.engine, service.config.health_timeout
    if not engine.ready:
        raise EngineDead(f"the engine is down: {engine.last_death or 'it is starting'}")
    if most and engine.seconds_silent > most:
        raise EngineDead(f"the engine has not answered for {engine.seconds_silent:.0f} s (--health-timeout {most:g})")
    background = service.background.states or msgspec.UNSET
    states = engine.replica_states or msgspec.UNSET
    return answer(Health(status="ok", restarts=engine.num_restarts, replicas=states, background=background))


async def ready(request: web.Request) -> web.Response:
    """Answer 200 while new requests are taken: not while draining."""
    if request.app[SERVICE].draining:
        raise Unavailable("the server is shutting down", retry_after=5)
    return await health(request)


async def health_generate(request: web.Request) -> web.Response:
    """Show health by making one token."""
    service = request.app[SERVICE]
    token = NewRequest(
        id=f"health-{secrets.token_hex(8)}", prompt=[0], params=SamplingParams(max_tokens=1, temperature=0.0)
    )

    async def one() -> None:
        async with aclosing(service.engine.generate(token)) as outputs:
            async for _ in outputs:
                pass

    try:
        await asyncio.wait_for(one(), _PATIENCE)
    except asyncio.TimeoutError:
        raise Unavailable(f"the engine made no token in {_PATIENCE:g} s") from None
    return await health(request)


async def version(request: web.Request) -> web.Response:
    """Return the server's version."""
    return answer(Version(version=__version__))


async def model_info(request: web.Request) -> web.Response:
    """Summarize the model as SGLang does."""
    service = request.app[SERVICE]
    path = service.root(request.headers)
    return answer(ModelSummary(model_path=path, tokenizer_path=path, max_model_len=service.encoder.max_model_len))


async def metrics(request: web.Request) -> web.Response:
    """Return Prometheus metrics, with vLLM's names."""
    page = await request.app[SERVICE].metrics_page.get(partial(_metrics_page, request.app[SERVICE]))
    return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _figures(engine: ServingEngine) -> tuple[Any, list[AdapterInfo], list[ReplicaState]]:
    """Ask for one after the other: of two at once, asyncio would log the second when the client leaves."""
    return await engine.call("stats"), await engine.list_adapters(), await engine.replicas()


async def _metrics_page(service: Service) -> bytes:
    engine = service.engine
    answered = await _ask(engine, partial(_figures, engine))
    stats, adapters, replicas = answered or (None, [], [])
    render = partial(service.metrics.render, stats, adapters, engine.model, engine.num_restarts, replicas)
    return await service.offload.run_on_thread(render)
