"""Anthropic's messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inlaid.server.protocol.base import Body, Payload
from inlaid.server.protocol.openai import MAX_ITEMS


class InputBlock(Body, frozen=True, kw_only=True):
    """A part of a message. Only text is served; the fields of other kinds are here to be refused by name."""

    type: str
    text: str | None = None
    id: str | None = None  # of a call
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None  # of a call's result
    content: str | list[InputBlock] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    source: Any = None  # of a document or an image
    title: str | None = None
    # no effect
    cache_control: Any = None
    citations: Any = None
    signature: str | None = None
    data: str | None = None
    context: str | None = None
    caller: Any = None


class InputMessage(Body, frozen=True, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[InputBlock]


class MessageTool(Body, frozen=True, kw_only=True):
    """A function. Tools that run on the provider's servers are refused by their type."""

    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    # no effect
    cache_control: Any = None
    input_examples: Any = None
    eager_input_streaming: bool | None = None


class MessageToolChoice(Body, frozen=True, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class MessageMetadata(Body, frozen=True, kw_only=True):
    user_id: str | None = None


class OutputFormat(Body, frozen=True, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Body, frozen=True, kw_only=True):
    format: OutputFormat | None = None
    effort: str | None = None


class CountBody(Body, frozen=True, kw_only=True):
    """The fields that messages and the counting of their tokens share."""

    model: str = ""
    messages: Annotated[list[InputMessage], Meta(min_length=1, max_length=MAX_ITEMS)]
    system: str | list[InputBlock] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    # no effect
    thinking: Any = None
    cache_control: Any = None


class MessagesBody(CountBody, frozen=True, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: MessageMetadata | None = None
    # no effect
    service_tier: str | None = None


class TextBlock(Payload, kw_only=True):
    type: Literal["text"] = "text"
    text: str
    citations: None = None


class ThinkingBlock(Payload, kw_only=True):
    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""


class CallBlock(Payload, kw_only=True):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


OutputBlock = TextBlock | ThinkingBlock | CallBlock


class MessageUsage(Payload, kw_only=True):
    """Tokens of the prompt that were not in the prefix cache, and those that were."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class MadeMessage(Payload, kw_only=True):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Any]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"] | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class MessageEvent(Payload, kw_only=True):
    """An event of a stream; its type says which of the fields it has."""

    type: str
    message: MadeMessage | msgspec.UnsetType = msgspec.UNSET
    index: int | msgspec.UnsetType = msgspec.UNSET
    content_block: Any | msgspec.UnsetType = msgspec.UNSET
    delta: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    usage: MessageUsage | msgspec.UnsetType = msgspec.UNSET


class InputTokens(Payload, kw_only=True):
    input_tokens: int
