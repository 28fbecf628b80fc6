"""OpenAI's responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inlaid.server.protocol.base import Body, Payload
from inlaid.server.protocol.openai import MAX_ITEMS

Role = Literal["user", "assistant", "system", "developer"]


class InputPart(Body, frozen=True, kw_only=True):
    """A part of an item's content. Only text is served; the fields of other kinds are here to be refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None  # no effect
    logprobs: list[Any] | None = None  # no effect
    image_url: Any = None
    file_id: Any = None
    file_data: Any = None
    detail: Any = None


class InputItem(Body, frozen=True, kw_only=True):
    """A message, a call, what it gave, reasoning, or a reference to an item that is stored here."""

    type: Literal["message", "function_call", "function_call_output", "reasoning", "item_reference"] | None = (
        None  # a message
    )
    id: str | None = None
    role: Role | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    # no effect
    status: str | None = None
    phase: str | None = None
    summary: list[Any] | None = None
    encrypted_content: str | None = None


class ResponseTool(Body, frozen=True, kw_only=True):
    """A function. Tools that run on the server of a provider are refused by their type."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["function"]})]
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedResponseTool(Body, frozen=True, kw_only=True):
    type: Literal["function"]
    name: str


class ResponseToolChoice(Body, frozen=True, kw_only=True):
    """One tool that must be called, or those that may be."""

    type: Literal["function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[NamedResponseTool] | None = None


class TextFormat(Body, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Body, frozen=True, kw_only=True):
    format: TextFormat | None = None
    verbosity: str | None = None  # no effect


class ReasoningOptions(Body, frozen=True, kw_only=True):
    effort: str | None = None
    # no effect
    summary: str | None = None
    generate_summary: str | None = None


class ResponseStreamOptions(Body, frozen=True, kw_only=True):
    include_obfuscation: bool | None = None  # no effect


class ResponseBody(Body, frozen=True, kw_only=True):
    model: str = ""
    input: str | Annotated[list[InputItem], Meta(max_length=MAX_ITEMS)]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    # vLLM's
    top_k: int | None = None
    seed: int | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    # no effect
    include: list[str] | None = None
    max_tool_calls: int | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    stream_options: ResponseStreamOptions | None = None
    # one value only
    background: Literal[False] | None = None
    conversation: None = None
    prompt: None = None


class OutputText(Payload, kw_only=True):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = msgspec.field(default_factory=list)
    logprobs: list[Any] = msgspec.field(default_factory=list)


class ReasoningText(Payload, kw_only=True):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputMessage(Payload, kw_only=True):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: str
    content: list[OutputText]


class OutputCall(Payload, kw_only=True):
    id: str
    type: Literal["function_call"] = "function_call"
    status: str
    call_id: str
    name: str
    arguments: str


class OutputReasoning(Payload, kw_only=True):
    id: str
    type: Literal["reasoning"] = "reasoning"
    status: str
    summary: list[Any] = msgspec.field(default_factory=list)
    content: list[ReasoningText]


OutputItem = OutputMessage | OutputCall | OutputReasoning


class InputDetails(Payload, kw_only=True):
    cached_tokens: int


class OutputDetails(Payload, kw_only=True):
    reasoning_tokens: int = 0


class ResponseUsage(Payload, kw_only=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = msgspec.field(default_factory=OutputDetails)
    total_tokens: int


class Incomplete(Payload, kw_only=True):
    reason: Literal["max_output_tokens", "content_filter"]


class ResponseError(Payload, kw_only=True):
    code: str
    message: str


class Response(Payload, kw_only=True):
    """An answer. What was asked comes back with it, as OpenAI does."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, Any] = msgspec.field(default_factory=dict)
    model: str
    output: list[Any]
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: ReasoningOptions | None = None
    service_tier: str = "default"
    store: bool = True
    temperature: float | None = None
    text: TextOptions | None = None
    tool_choice: Any = "auto"
    tools: list[ResponseTool] = msgspec.field(default_factory=list)
    top_p: float | None = None
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class ResponseEvent(Payload, kw_only=True):
    """An event of a stream; its type says which of the fields it has."""

    type: str
    sequence_number: int
    response: Response | msgspec.UnsetType = msgspec.UNSET
    output_index: int | msgspec.UnsetType = msgspec.UNSET
    content_index: int | msgspec.UnsetType = msgspec.UNSET
    item_id: str | msgspec.UnsetType = msgspec.UNSET
    item: Any | msgspec.UnsetType = msgspec.UNSET
    part: Any | msgspec.UnsetType = msgspec.UNSET
    delta: str | msgspec.UnsetType = msgspec.UNSET
    text: str | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str | msgspec.UnsetType = msgspec.UNSET
    logprobs: list[Any] | msgspec.UnsetType = msgspec.UNSET
    code: str | msgspec.UnsetType | None = msgspec.UNSET
    message: str | msgspec.UnsetType = msgspec.UNSET
    param: str | msgspec.UnsetType | None = msgspec.UNSET


class DeletedResponse(Payload, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
