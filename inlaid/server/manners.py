"""Routes that other servers' clients and operators ask for beside the API itself, and what is not served here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aiohttp import web

from inlaid.server.completions import answer
from inlaid.server.errors import BadRequest, Forbidden
from inlaid.server.protocol.info import Load
from inlaid.server.service import SERVICE

_PAGE = Path(__file__).with_name("docs.html")


async def docs(request: web.Request) -> web.Response:
    """Show the API as a page, which asks no other host for anything."""
    return web.Response(body=_PAGE.read_bytes(), content_type="text/html", charset="utf-8")


async def load(request: web.Request) -> web.Response:
    """Return how many requests are being answered, as vLLM does."""
    return answer(Load(server_load=request.app[SERVICE].num_in_flight))


async def tokenizer_info(request: web.Request) -> web.Response:
    """Return the tokenizer's configuration, with the chat template that is used."""
    service = request.app[SERVICE]
    model = service.engine.model
    assert model is not None
    return answer({**_tokenizer_config(Path(model.folder)), "chat_template": service.tokenizer.template.source or None})


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


async def reset_prefix_cache(request: web.Request) -> web.Response:
    """Forget every prompt in the prefix cache; vLLM's name for /flush_cache."""
    await request.app[SERVICE].engine.call("flush_cache")
    return web.Response(text="done\n")


async def start_profile(request: web.Request) -> web.Response:
    """Begin to record what the engine's steps do, with torch's profiler."""
    service = request.app[SERVICE]
    if not service.config.profile_dir:
        raise Forbidden("profiles are off; start with --profile-dir, the folder that they are written to")
    try:
        await service.engine.call("start_profile", folder=service.config.profile_dir)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    return web.Response(text="The profile has begun.\n")


async def stop_profile(request: web.Request) -> web.Response:
    """End the profile and write its trace, which chrome://tracing and ui.perfetto.dev show."""
    try:
        path = await request.app[SERVICE].engine.call("stop_profile")
    except ValueError as error:
        raise BadRequest(str(error)) from error
    return web.Response(text=f"The profile is in {path}\n")


async def embeddings(request: web.Request) -> web.Response:
    """Say that no embeddings are made here."""
    text = "embeddings are not served: the models here generate text and have no pooling; use an embedding server"
    raise BadRequest(text, code="not_served")


async def moderations(request: web.Request) -> web.Response:
    """Say that nothing is moderated here."""
    text = "moderations are not served: ask a model, or an adapter trained to judge texts, through chat completions"
    raise BadRequest(text, code="not_served")
