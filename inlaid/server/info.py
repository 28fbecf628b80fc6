"""The routes that tell about the server: models, tokens, health, metrics, version."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import aclosing

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from inlaid import __version__
from inlaid.engine.async_engine import EngineDead
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.server.completions import answer
from inlaid.server.errors import BadRequest, NotFound, Unavailable
from inlaid.server.prepare import chat_tokens, encode, resolve, template_options
from inlaid.server.protocol import (
    DetokenizeBody,
    Detokenized,
    Health,
    ModelCard,
    ModelList,
    ModelSummary,
    TokenizeBody,
    Tokens,
    Version,
)
from inlaid.server.service import SERVICE, Service

_PATIENCE = 30.0  # seconds that a probe which makes a token may take


def _cards(service: Service) -> list[ModelCard]:
    base = ModelCard(
        id=service.model_name, created=service.started, root=service.model_path, max_model_len=service.max_model_len
    )
    adapters = [
        ModelCard(
            id=info.name,
            created=service.started,
            root=info.path,
            parent=service.model_name,
            max_model_len=service.max_model_len,
        )
        for info in service.engine.adapters.values()
    ]
    return [base, *adapters]


async def models(request: web.Request) -> web.Response:
    """The base and its adapters, each a model."""
    return answer(ModelList(data=_cards(request.app[SERVICE])))


async def model(request: web.Request) -> web.Response:
    """One model."""
    name = request.match_info["name"]
    for card in _cards(request.app[SERVICE]):
        if card.id == name:
            return answer(card)
    raise NotFound(f"model {name!r} does not exist here", "model", "model_not_found")


async def tokenize(request: web.Request, body: TokenizeBody) -> web.Response:
    """Token ids of a text, or of a conversation through the chat template."""
    service = request.app[SERVICE]
    resolve(service, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("give either prompt or messages")
    if body.messages is not None:
        tokens = await chat_tokens(
            service, body.messages, body.tools, template_options(body), bool(body.add_special_tokens)
        )
    else:
        special = True if body.add_special_tokens is None else body.add_special_tokens
        tokens = await encode(service.tokenizer, body.prompt or "", special)
    texts = [service.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    return answer(Tokens(count=len(tokens), max_model_len=service.max_model_len, tokens=tokens, token_strs=texts))


async def detokenize(request: web.Request, body: DetokenizeBody) -> web.Response:
    """The text of token ids, specials included."""
    service = request.app[SERVICE]
    resolve(service, body.model)
    for token in body.tokens:
        if not 0 <= token < service.vocab_size:
            raise BadRequest(f"token {token} is not in the vocabulary, 0 to {service.vocab_size - 1}", "tokens")
    return answer(Detokenized(prompt=service.tokenizer.decode(body.tokens, skip_special_tokens=False)))


async def health(request: web.Request) -> web.Response:
    """200 while the engine process serves."""
    engine = request.app[SERVICE].engine
    if not engine.ready:
        raise EngineDead(f"the engine is down: {engine.last_death or 'it is starting'}")
    return answer(Health(status="ok", restarts=engine.num_restarts))


async def ready(request: web.Request) -> web.Response:
    """200 while new requests are taken: not while draining."""
    if request.app[SERVICE].draining:
        raise Unavailable("the server is shutting down", retry_after=5)
    return await health(request)


async def health_generate(request: web.Request) -> web.Response:
    """Health shown by making one token."""
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
    """The server's version."""
    return answer(Version(version=__version__))


async def model_info(request: web.Request) -> web.Response:
    """SGLang's summary of the model."""
    service = request.app[SERVICE]
    path = service.model_path
    return answer(ModelSummary(model_path=path, tokenizer_path=path, max_model_len=service.max_model_len))


async def metrics(request: web.Request) -> web.Response:
    """Prometheus metrics, with vLLM's names."""
    service = request.app[SERVICE]
    engine = service.engine
    try:
        stats, adapters = await asyncio.wait_for(
            asyncio.gather(engine.call("stats"), engine.list_adapters()), _PATIENCE
        )
    except (EngineDead, asyncio.TimeoutError):
        stats, adapters = None, []
    page = service.metrics.show(stats, adapters, engine.model, engine.num_restarts)
    return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})
