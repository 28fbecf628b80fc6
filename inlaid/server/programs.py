"""POST /v1/programs: prompt programs of clients. Each call is an ordinary request of the client's tenant, so that
policies, limits and the ledger treat it like any other; `program_driver.py` sends it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from inlaid.engine.refusal import Refused
from inlaid.program.call import Call
from inlaid.program.compile import compile_program
from inlaid.program.evaluate import MAX_TEXT
from inlaid.program.execute import Event, Results, Run
from inlaid.program.nodes import AnyNode, Generate, Map
from inlaid.program.options import Limits
from inlaid.program.target import Target
from inlaid.program.values import Failure, failure_in
from inlaid.server import safety
from inlaid.server.bodies import body_size
from inlaid.server.completions import answer
from inlaid.server.errors import ErrorBody, refused
from inlaid.server.prepare import ClientRequest, find, priority_of
from inlaid.server.program_driver import Driver
from inlaid.server.protocol.openai import CachedTokens, Usage
from inlaid.server.protocol.programs import ProgramAnswer, ProgramBody, ProgramCall, ProgramEvent, ProgramResult
from inlaid.server.service import SERVICE, Service
from inlaid.server.streaming import event, send
from inlaid.text.nesting import check_depth
from inlaid.worker.errors import EngineDead

_VALUES_PER_CALL = 16  # values that a program may compute for each call that it may make


async def programs(request: web.Request, body: ProgramBody) -> web.StreamResponse:
    """Run a program: a graph of calls with adapters."""
    service = request.app[SERVICE]
    driver = await _driver(request, service, body, body_size(request))
    if body.stream:
        return await send(request, _events(driver), service.config.stream_timeout)
    async with aclosing(driver.turns()) as turns:
        async for _ in turns:
            pass
    (results,) = driver.run.results()
    _refuse_whole(results)
    return answer(
        ProgramAnswer(
            id=driver.client.id,
            created=driver.client.created,
            results={name: _result(value) for name, value in results.values_by_name.items()},
            calls=[_call(call) for call in results.calls],
            usage=_usage(results),
        )
    )


async def _driver(request: web.Request, service: Service, body: ProgramBody, size: int) -> Driver:
    check_depth("inputs", body.inputs)
    adapters = {name: await find(service, name, "nodes") for name in sorted(_adapters(body.nodes))}
    if service.engine.model is None or not service.engine.ready:
        raise EngineDead("the engine is not ready")
    target = Target(service.encoder, service.engine.model.block_size, adapters)
    given = (body.nodes, tuple(body.inputs), body.outputs, target, body.options)
    plan = await service.offload.run_chat(size, compile_program, *given)  # it asks the chat template for fixed texts
    limits = _limits(service, body)
    run = await service.offload.run(size, partial(Run, plan, [body.inputs], limits, body.seed))
    name = f"prog-{body.request_id or secrets.token_hex(16)}"
    client = ClientRequest(name, int(time.time()), service.names.base, [], 1, [])
    tenant = partial(safety.tenant, service.engine.config.scheduler.tenant, service.keys, request.headers, body.user)
    return Driver(request, service, run, client, tenant, priority_of(body.priority))


def _adapters(nodes: list[AnyNode] | tuple[AnyNode, ...]) -> set[str]:
    """Return the names of all adapters in nodes and in the bodies of maps."""
    found: set[str] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if isinstance(node, Map):
            left += node.nodes
        elif isinstance(node, Generate) and node.adapter is not None:
            found.add(node.adapter)
    return found


def _limits(service: Service, body: ProgramBody) -> Limits:
    """Return the server's bounds, and the client's where they are lower."""
    config = service.config
    calls = _least(config.max_program_calls, body.max_calls)
    return Limits(
        max_calls=int(calls),
        max_tokens=int(_least(config.max_program_tokens, body.max_tokens)),
        max_values=_VALUES_PER_CALL * config.max_program_calls,
        max_chars=MAX_TEXT,
        seconds=_least(config.request_timeout, body.seconds),
    )


def _least(bound: float, asked: float | None) -> float:
    """Return the lower of a bound (0: none) and what a client asks for."""
    return bound if asked is None else asked if not bound else min(bound, asked)


def _refuse_whole(results: Results) -> None:
    """Refuse a program of which nothing was answered at all, as its first failure says."""
    made = any(call.answer.tokens for call in results.calls)
    if results.calls and not made and len(results.failures) == len(results):
        raise Refused(next(iter(results.failures.values())).refusal)


async def _events(driver: Driver) -> AsyncGenerator[bytes, None]:
    client = driver.client
    async with aclosing(driver.turns()) as turns:
        async for news in turns:
            for each in news:
                yield event(_event(client, each))
    (results,) = driver.run.results()
    calls = [_call(call) for call in results.calls]
    yield event(ProgramEvent(id=client.id, created=client.created, calls=calls, usage=_usage(results)))


def _event(client: ClientRequest, news: Event) -> ProgramEvent:
    return ProgramEvent(
        id=client.id,
        created=client.created,
        name=news.name,
        path=list(news.path),
        delta=msgspec.UNSET if news.text is None else news.text,
        result=_result(news.value) if news.complete else msgspec.UNSET,
    )


def _result(value: Any) -> ProgramResult:
    if isinstance(value, Failure):
        return ProgramResult(error=_error(value))
    if isinstance(value, list) and failure_in(value) is not None:
        return ProgramResult(elements=[_result(item) for item in value])
    return ProgramResult(value=value)


def _error(failure: Failure) -> ErrorBody:
    return refused(failure.refusal).body.error


def _call(call: Call) -> ProgramCall:
    reason, value = call.answer.finish_reason, call.cell.value
    return ProgramCall(
        name=call.where,
        adapter=call.adapter,
        prompt_tokens=len(call.prompt),
        completion_tokens=len(call.answer.tokens),
        cached_tokens=call.answer.num_cached,
        finish_reason=None if reason is None else reason.value,
        equals=msgspec.UNSET if call.equals is None else call.equals.where,
        error=_error(value) if isinstance(value, Failure) else msgspec.UNSET,
    )


def _usage(results: Results) -> Usage:
    """Return the tokens of the calls that were made: each is charged once, whoever takes its answer."""
    made = [call for call in results.calls if call.answer.tokens]
    prompt, completion = sum(len(call.prompt) for call in made), sum(len(call.answer.tokens) for call in made)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=CachedTokens(cached_tokens=sum(call.answer.num_cached for call in made)),
    )
