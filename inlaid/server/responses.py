"""/v1/responses: an answer as a row of items, whole or as a stream of events, and kept for later requests."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Any

import msgspec
from aiohttp import web

from inlaid.engine.request import FinishReason
from inlaid.server.access import note_client
from inlaid.server.answers import TokenCounter, chat_logprobs
from inlaid.server.blocks import Block, Blocks, Change, Kind, read_blocks
from inlaid.server.bodies import body_size
from inlaid.server.completions import answer
from inlaid.server.conversation import chat_request
from inlaid.server.errors import ApiError
from inlaid.server.prepare import ClientRequest
from inlaid.server.protocol.chat import ChatLogprob
from inlaid.server.protocol.responses import (
    DeletedResponse,
    Incomplete,
    InputDetails,
    InputItem,
    OutputCall,
    OutputDetails,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    Response,
    ResponseBody,
    ResponseError,
    ResponseEvent,
    ResponseUsage,
)
from inlaid.server.reading import Reader
from inlaid.server.response_request import chat_body, conversation
from inlaid.server.service import SERVICE
from inlaid.server.streaming import named_event, send
from inlaid.text.stream import Piece

_DELTAS: Mapping[Kind, str] = MappingProxyType(  # the events of a block's text
    {
        "text": "response.output_text",
        "reasoning": "response.reasoning_text",
        "call": "response.function_call_arguments",
    }
)


async def create_response(request: web.Request, body: ResponseBody) -> web.StreamResponse:
    """Answer a conversation of items, with calls of functions and reasoning as items of their own."""
    service = request.app[SERVICE]
    items = conversation(body, service.responses, _owner(request))
    size = body_size(request) + 64 * len(items)
    client = note_client(request, await chat_request(service, chat_body(body, items), request.headers, size))
    making = _Making(request, body, client, items)
    if body.stream:
        return await send(request, making.events(), service.config.stream_timeout, b"", making.failed)
    async with aclosing(making.read()) as arriving:
        async for _ in arriving:
            pass
    return answer(making.close())


async def get_response(request: web.Request) -> web.Response:
    """Return a stored response."""
    return answer(request.app[SERVICE].responses.get(_owner(request), request.match_info["name"], "id").response)


async def delete_response(request: web.Request) -> web.Response:
    """Forget a stored response."""
    name = request.match_info["name"]
    request.app[SERVICE].responses.delete(_owner(request), name)
    return answer(DeletedResponse(id=name))


def _owner(request: web.Request) -> str:
    """Return the client that may read what it stores: the tenant of its key, or anybody where there are no keys."""
    return request.app[SERVICE].keys.tenant(request.headers)


class _Making:
    """A response being made."""

    def __init__(self, request: web.Request, body: ResponseBody, client: ClientRequest, items: list[InputItem]) -> None:
        self._request, self._service = request, request.app[SERVICE]
        self._body, self._client, self._items = body, client, items
        self._id = f"resp_{body.request_id or secrets.token_hex(24)}"
        self._blocks, self._reader = Blocks(), Reader(client.form)
        self._counter = TokenCounter(client)
        self._numbers: Iterator[int] = itertools.count()
        self._logprobs: list[ChatLogprob] = []
        self._reason: FinishReason | None = None

    async def read(self) -> AsyncGenerator[tuple[Piece, list[Change]], None]:
        """Yield the answer as it comes."""
        async with aclosing(read_blocks(self._service, self._client, self._blocks, self._reader)) as arriving:
            async for piece, changes in arriving:
                self._counter.add(0, len(piece.tokens), piece.num_cached)
                self._reason = piece.finish_reason
                if self._body.top_logprobs and piece.logprobs:
                    self._logprobs += chat_logprobs(self._service.tokenizer, piece.logprobs).content
                yield piece, changes

    def close(self) -> Response:
        """Return the whole response, and store it if the client lets us."""
        made = self._response("incomplete" if self._reason is FinishReason.LENGTH else "completed")
        if made.store:
            self._service.responses.put(_owner(self._request), made, self._items)
        return made

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream. The first goes out with the first token, so that a refusal is a status."""
        begun = False
        async with aclosing(self.read()) as arriving:
            async for _, changes in arriving:
                if not begun:
                    begun = True
                    yield self._event("response.created", response=self._response("in_progress"))
                    yield self._event("response.in_progress", response=self._response("in_progress"))
                for change in changes:
                    for made in self._changed(*change):
                        yield made
        whole = self.close()
        yield self._event(f"response.{whole.status}", response=whole)

    def failed(self, error: ApiError) -> bytes:
        """Return the event that ends a stream which has failed."""
        response = self._response("failed")
        response.error = ResponseError(code=error.code or error.kind, message=error.message)
        return self._event("response.failed", response=response)

    def _response(self, status: Any) -> Response:
        body, finished = self._body, status != "in_progress"
        return Response(
            id=self._id,
            created_at=self._client.created,
            status=status,
            incomplete_details=Incomplete(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=self._client.model,
            output=[self._item(block, status) for block in self._blocks.all] if finished else [],
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            reasoning=body.reasoning,
            store=body.store is not False,
            temperature=body.temperature,
            text=body.text,
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_p=body.top_p,
            truncation=body.truncation or "disabled",
            usage=self._usage() if finished else None,
            user=body.user,
        )

    def _usage(self) -> ResponseUsage:
        used = self._counter.usage()
        thought = "".join(block.text for block in self._blocks.all if block.kind == "reasoning")
        num_thought = len(self._service.tokenizer.encode(thought, False)) if thought else 0
        return ResponseUsage(
            input_tokens=used.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=used.prompt_tokens_details.cached_tokens),
            output_tokens=used.completion_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=min(num_thought, used.completion_tokens)),
            total_tokens=used.total_tokens,
        )

    def _item(self, block: Block, status: str, empty: bool = False) -> OutputItem:
        """Return a block as an item; `empty`: as it begins."""
        text = "" if empty else block.text
        if block.kind == "call":
            arguments = text
            return OutputCall(
                id=_call_item(block), status=status, call_id=block.id, name=block.name, arguments=arguments
            )
        if block.kind == "reasoning":
            return OutputReasoning(id=block.id, status=status, content=[] if empty else [ReasoningText(text=text)])
        return OutputMessage(id=block.id, status=status, content=[] if empty else [self._part(text)])

    def _part(self, text: str) -> OutputText:
        return OutputText(text=text, logprobs=[msgspec.to_builtins(one) for one in self._logprobs] if text else [])

    def _changed(self, what: str, block: Block, text: str) -> Iterator[bytes]:
        """Yield the events of one change."""
        kind, at = _DELTAS[block.kind], {"output_index": block.index, "item_id": _item_id(block)}
        part: dict[str, Any] = {} if block.kind == "call" else {**at, "content_index": 0}
        extra: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        if what == "begin":
            item = self._item(block, "in_progress", empty=True)
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if part:
                yield self._event("response.content_part.added", **part, part=self._as_part(block, ""))
        elif what == "more":
            yield self._event(f"{kind}.delta", **(part or at), delta=text, **extra)
        else:
            if part:
                yield self._event(f"{kind}.done", **part, text=block.text, **extra)
                yield self._event("response.content_part.done", **part, part=self._as_part(block, block.text))
            else:
                yield self._event(f"{kind}.done", **at, name=block.name, arguments=block.text)
            item = self._item(block, "completed")
            yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _as_part(self, block: Block, text: str) -> OutputText | ReasoningText:
        return ReasoningText(text=text) if block.kind == "reasoning" else self._part(text)

    def _event(self, kind: str, **fields: Any) -> bytes:
        return named_event(kind, ResponseEvent(type=kind, sequence_number=next(self._numbers), **fields))


def _item_id(block: Block) -> str:
    return _call_item(block) if block.kind == "call" else block.id


def _call_item(block: Block) -> str:
    """Return the id of a call as an item, which is not the one that its output names."""
    return f"fc_{block.id.removeprefix('call_')}"
