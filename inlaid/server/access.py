"""The log of requests: one line for each HTTP request, with its tenant, its counts and its seconds by part, and without
its text unless asked; and its spans.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from inlaid.server.prepare import ClientRequest, Outcome
from inlaid.server.route import Guard, Route
from inlaid.server.service import SERVICE
from inlaid.worker import logs

log = logging.getLogger(__name__)

# A request's warnings, for its answer, which begins when its note is gone. Older releases of aiohttp have names only.
_WARNINGS: Any = web.RequestKey("warnings", tuple) if hasattr(web, "RequestKey") else "warnings"
_CLIENT_LEFT = 499  # nginx's number for it
_MAX_PROMPT_CHARS = 1000
_MAX_ID_CHARS = 128  # of the client's own name for a request

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class _Note:
    """Facts about a request that become known while it is answered."""

    client: ClientRequest | None = None
    error: str | None = None
    guard: Guard | None = None
    answering: bool = False
    started: float = field(default_factory=time.monotonic)


NOTES: web.AppKey[dict[asyncio.Protocol, _Note]] = web.AppKey("notes", dict)  # by connection, of what is being answered


def note_client(request: web.Request, client: ClientRequest) -> ClientRequest:
    """Remember what a request asks for, and return it."""
    request.app[NOTES][request.protocol].client = client
    if client.hint:
        warn_client(request, client.hint)
    return client


def warn_client(request: web.Request, text: str) -> None:
    """Have the answer carry a warning: one line of ASCII."""
    request[_WARNINGS] = (*request.get(_WARNINGS, ()), text)


async def add_warnings(request: web.Request, response: web.StreamResponse) -> None:
    """Add the warnings to an answer, before that begins."""
    for text in request.get(_WARNINGS, ()):
        response.headers.add("Warning", f'299 inlaid "{text}"')


def note_error(request: web.Request, message: str) -> None:
    """Remember why a request is answered with an error."""
    request.app[NOTES][request.protocol].error = message


def note_route(request: web.Request, route: Route) -> None:
    """Remember the route of a request, which decides the level of its line."""
    note = request.app[NOTES][request.protocol]
    note.guard, note.answering = route.guard, route.answering


@web.middleware
async def logged(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Log a request when it has been answered: answers, changes and errors at info, the others at debug."""
    note = request.app[NOTES][request.protocol] = _Note()
    status = _CLIENT_LEFT
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        del request.app[NOTES][request.protocol]
        _end(request, note, status)


def _spans(note: _Note, outcome: Outcome) -> dict[str, object]:
    """Split a request's seconds: in the queue, of these for its adapter, until the first token, until the last.

    Those for its adapter are reading it from disk, copying it to the device, and waiting for a place or for other
    adapters. The host's seconds are its share of what the engine process took to make its steps (on a CPU: to compute
    them); they are not known of an answer that a stop string ended.
    """
    if outcome.first is None or outcome.last is None or outcome.queue_time is None:
        return {}
    waiting = outcome.adapter_time - outcome.adapter_read - outcome.adapter_copy
    return {
        "queue_seconds": outcome.queue_time,
        "adapter_seconds": outcome.adapter_time,
        "adapter_read_seconds": outcome.adapter_read,
        "adapter_copy_seconds": outcome.adapter_copy,
        "adapter_wait_seconds": max(0.0, waiting),
        "prefill_seconds": max(0.0, outcome.first - note.started - outcome.queue_time),
        "decode_seconds": outcome.last - outcome.first,
        "host_seconds": outcome.host_time or None,
    }


def _end(request: web.Request, note: _Note, status: int) -> None:
    """Write a request's line, and its spans where they are wanted."""
    service, changes = request.app[SERVICE], note.guard is Guard.ADMIN and request.method != "GET"
    important = note.answering or changes or status >= 400  # a job is looked at twice a second
    level = logging.INFO if important else logging.DEBUG
    logged = service.config.log_requests and log.isEnabledFor(level)
    traced = service.traces is not None and note.answering
    if not logged and not traced:
        return
    line = _line(request, note, status)
    if traced and service.traces is not None:
        params = None if note.client is None else note.client.requests[0].params
        service.traces.record(line, params, request.headers)
    if logged:
        log.log(level, "request", extra=logs.fields(**line))


def _line(request: web.Request, note: _Note, status: int) -> dict[str, object]:
    """Return what there is to say of a request."""
    line: dict[str, object] = {
        "method": request.method,
        "path": request.path,
        "status": status,
        "seconds": time.monotonic() - note.started,
        "peer": request.remote,
        "error": note.error,
    }
    if (client := note.client) is not None:
        outcome = client.outcome
        line |= {
            "id": client.id,
            "request_id": request.headers.get("X-Request-Id", "")[:_MAX_ID_CHARS] or None,
            "model": client.model,
            "tenant": client.requests[0].tenant or None,
            "answers": len(client.requests),
            "prompt_tokens": sum(len(each.prompt) for each in client.requests[:: client.num_answers]),
            "cached_tokens": outcome.num_cached,
            "output_tokens": outcome.num_tokens,
            "first_token_seconds": outcome.first - note.started if outcome.first is not None else None,
            **_spans(note, outcome),
            "finish": ",".join(sorted(outcome.reasons)) or None,
        }
        if request.app[SERVICE].config.log_prompts:
            service = request.app[SERVICE]
            text = client.text_of(0)
            text = service.tokenizer.decode(client.prompt_of(0)[:_MAX_PROMPT_CHARS]) if text is None else text
            line["prompt"] = text[:_MAX_PROMPT_CHARS]
    return line
