"""/v1/messages: Anthropic's requests, answered whole or as a stream of its events; errors have its shape too."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Any

import msgspec
from aiohttp import web

from inlaid.engine.request import FinishReason
from inlaid.server.access import note_client
from inlaid.server.answers import TokenCounter
from inlaid.server.blocks import Block, Blocks, Change, Kind, read_blocks
from inlaid.server.bodies import body_size
from inlaid.server.completions import answer
from inlaid.server.conversation import chat_request, chat_tokens, chosen_tools, template_options
from inlaid.server.errors import ApiError
from inlaid.server.message_request import chat_body
from inlaid.server.prepare import ClientRequest
from inlaid.server.protocol.anthropic import (
    CallBlock,
    CountBody,
    InputTokens,
    MadeMessage,
    MessageEvent,
    MessagesBody,
    MessageUsage,
    OutputBlock,
    TextBlock,
    ThinkingBlock,
)
from inlaid.server.protocol.chat import ChatBody
from inlaid.server.reading import Reader
from inlaid.server.service import SERVICE, Service
from inlaid.server.streaming import named_event, send
from inlaid.text.stream import Piece

_DELTAS: Mapping[Kind, tuple[str, str]] = MappingProxyType(  # the type of a block's change, and the field that it has
    {
        "text": ("text_delta", "text"),
        "reasoning": ("thinking_delta", "thinking"),
        "call": ("input_json_delta", "partial_json"),
    }
)


async def create_message(request: web.Request, body: MessagesBody) -> web.StreamResponse:
    """Answer a conversation in Anthropic's form."""
    service = request.app[SERVICE]
    chat = chat_body(body)
    client = note_client(request, await chat_request(service, chat, request.headers, body_size(request)))
    making = _Making(request, client)
    if body.stream:
        return await send(request, making.events(), service.config.stream_timeout, b"", _failed)
    async with aclosing(making.read()) as arriving:
        async for _ in arriving:
            pass
    return answer(making.message(finished=True))


async def count_tokens(request: web.Request, body: CountBody) -> web.Response:
    """Count the tokens of a conversation, as its prompt would have them."""
    service = request.app[SERVICE]
    chat = chat_body(body)
    service.resolve(body.model)
    return await service.offload.run_chat(body_size(request), _counted, service, chat)


def _counted(service: Service, chat: ChatBody) -> web.Response:
    tools, _, _ = chosen_tools(chat)
    return answer(InputTokens(input_tokens=len(chat_tokens(service, chat.messages, tools, template_options(chat)))))


class _Making:
    """A message being made."""

    def __init__(self, request: web.Request, client: ClientRequest) -> None:
        self._request, self._service, self._client = request, request.app[SERVICE], client
        self._blocks, self._reader = Blocks(), Reader(client.form)
        self._counter = TokenCounter(client)
        self._last: Piece | None = None

    async def read(self) -> AsyncGenerator[tuple[Piece, list[Change]], None]:
        """Yield the answer as it comes."""
        async with aclosing(read_blocks(self._service, self._client, self._blocks, self._reader)) as arriving:
            async for piece, changes in arriving:
                self._counter.add(0, len(piece.tokens), piece.num_cached)
                self._last = piece
                yield piece, changes

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream. The first goes out with the first token, so that a refusal is a status."""
        begun = False
        async with aclosing(self.read()) as arriving:
            async for _, changes in arriving:
                if not begun:
                    begun = True
                    yield _event("message_start", message=self.message(finished=False))
                for change in changes:
                    for made in _changed(*change):
                        yield made
        reason, sequence = self._stopped()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield _event("message_delta", delta=delta, usage=self._usage())
        yield _event("message_stop")

    def message(self, finished: bool) -> MadeMessage:
        """Return the message, whole or as it begins."""
        reason, sequence = self._stopped() if finished else (None, None)
        return MadeMessage(
            id=f"msg_{self._client.id.partition('-')[2]}",
            model=self._client.model,
            content=[_block(block) for block in self._blocks.all] if finished else [],
            stop_reason=reason,
            stop_sequence=sequence,
            usage=self._usage(),
        )

    def _usage(self) -> MessageUsage:
        used = self._counter.usage()
        cached = used.prompt_tokens_details.cached_tokens
        return MessageUsage(
            input_tokens=used.prompt_tokens - cached,
            cache_read_input_tokens=cached,
            output_tokens=used.completion_tokens,
        )

    def _stopped(self) -> tuple[Any, str | None]:
        """Return Anthropic's reason for the end, and the stop sequence that was found."""
        assert self._last is not None
        if self._last.finish_reason is FinishReason.LENGTH:
            return "max_tokens", None
        if isinstance(self._last.stop_reason, str):
            return "stop_sequence", self._last.stop_reason
        return ("tool_use" if self._reader.answer.calls else "end_turn"), None


def _block(block: Block, empty: bool = False) -> OutputBlock:
    """Return a block of the content; `empty`: as it begins."""
    text = "" if empty else block.text
    if block.kind == "reasoning":
        return ThinkingBlock(thinking=text)
    return (
        CallBlock(id=block.id, name=block.name, input=_decoded(text)) if block.kind == "call" else TextBlock(text=text)
    )


def _decoded(arguments: str) -> dict[str, Any]:
    """Return arguments as the object that Anthropic's clients expect; those of a call that was cut off are left out."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}


def _changed(what: str, block: Block, text: str) -> Iterator[bytes]:
    """Yield the events of one change."""
    if what == "begin":
        yield _event("content_block_start", index=block.index, content_block=_block(block, empty=True))
    elif what == "more":
        kind, field = _DELTAS[block.kind]
        yield _event("content_block_delta", index=block.index, delta={"type": kind, field: text})
    else:
        yield _event("content_block_stop", index=block.index)


def _event(kind: str, **fields: Any) -> bytes:
    return named_event(kind, MessageEvent(type=kind, **fields))


def _failed(error: ApiError) -> bytes:
    return named_event("error", error.anthropic_body)
