"""OpenAI's chat completions, with what vLLM and SGLang add to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inlaid.server.protocol.base import Body, Payload
from inlaid.server.protocol.openai import MAX_ITEMS, GenerateBody, PromptLogprobs, Usage


class ContentPart(Body, frozen=True, kw_only=True):
    """A part of a message. Only text is served; the fields of other kinds are here to be refused by their name."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["text", "refusal"]})]
    text: str | None = None
    refusal: str | None = None
    cache_control: Any = None  # no effect: prefixes are cached without it
    image_url: Any = None
    input_audio: Any = None
    audio_url: Any = None
    video_url: Any = None
    file: Any = None


class FunctionCall(Body, frozen=True, kw_only=True):
    name: str
    arguments: str


class ToolCall(Body, frozen=True, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Body, frozen=True, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's newer name for reasoning_content
    # no effect: SDKs send answers back with these
    refusal: str | None = None
    annotations: list[Any] | None = None
    cache_control: Any = None
    thinking_blocks: list[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionDefinition(Body, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body, frozen=True, kw_only=True):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Body, frozen=True, kw_only=True):
    name: str


class NamedTool(Body, frozen=True, kw_only=True):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body, frozen=True, kw_only=True):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class ToolChoice(Body, frozen=True, kw_only=True):
    """One tool that must be called, or those that may be."""

    type: Literal["function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class ChatBody(GenerateBody, frozen=True, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_ITEMS)]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None  # for templates that show them
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None
    modalities: list[Literal["text"]] | None = None
    include_reasoning: bool | None = None  # false leaves it out
    separate_reasoning: bool | None = None  # false leaves it in the content
    # no effect
    verbosity: str | None = None
    prediction: Any = None
    # refused, with what to send instead
    chat_template: str | None = None
    functions: list[Any] | None = None
    function_call: Any = None


class TopLogprob(Payload, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob, kw_only=True):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Payload, kw_only=True):
    content: list[ChatLogprob]
    refusal: None = None


class CalledFunction(Payload, kw_only=True):
    name: str
    arguments: str


class MadeCall(Payload, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Payload, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[MadeCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(Payload, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(Payload, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class FunctionDelta(Payload, kw_only=True):
    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str


class CallDelta(Payload, kw_only=True):
    """The beginning of a call, or more of its arguments."""

    index: int
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET
    function: FunctionDelta


class Delta(Payload, kw_only=True):
    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[CallDelta] | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(Payload, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | msgspec.UnsetType | None = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(Payload, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
