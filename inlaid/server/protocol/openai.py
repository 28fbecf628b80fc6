"""OpenAI's completions, and the fields that chat completions share, with what vLLM and SGLang add to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inlaid.server.protocol.base import Body, Payload

MAX_ITEMS = 65_536

Prompt = Annotated[
    str | list[Any],
    Meta(
        description="a text, a list of texts, a list of token ids, or a list of lists of token ids",
        extra_json_schema={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        },
    ),
]


class StreamOptions(Body, frozen=True, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # no effect


class JsonSchemaFormat(Body, frozen=True, kw_only=True):
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(Body, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema: dict[str, Any] | None = None  # of json_object, as llama.cpp's clients send it


class StructuredOutputs(Body, frozen=True, kw_only=True):
    """vLLM's newer name for the guided_ fields."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    # no effect
    disable_fallback: bool | None = None
    # one value only
    disable_additional_properties: Literal[False] | None = None
    structural_tag: None = None


class GenerateBody(Body, frozen=True, kw_only=True):
    """The fields that completions and chat completions share."""

    model: str = ""
    lora_path: Annotated[str, Meta(description="SGLang's way to name an adapter")] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int | None = None
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Annotated[list[int], Meta(min_length=1)] | None = None
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_whitespace_pattern: str | None = None
    guided_grammar: Annotated[str, Meta(description="Lark, or GBNF")] | None = None
    regex: str | None = None  # SGLang's guided_regex
    json_schema: str | None = None  # SGLang's guided_json
    ebnf: str | None = None  # SGLang's guided_grammar
    user: str | None = None
    priority: int | None = None
    request_id: str | None = None
    rid: str | None = None  # SGLang's request_id
    cache_salt: Annotated[str, Meta(description="apart from other salts, no prefix is shared")] | None = None
    speculation: Annotated[bool, Meta(description="false: no guesses, and none from this answer")] | None = None
    deadline: Annotated[float, Meta(description="seconds from now to have the answer in")] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    # no effect
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    length_penalty: float | None = None  # of beam search
    kv_transfer_params: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    guided_decoding_backend: str | None = None
    # one value only
    use_beam_search: bool | None = None
    detokenize: Literal[True] | None = None


class CompletionBody(GenerateBody, frozen=True, kw_only=True):
    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class CachedTokens(Payload, kw_only=True):
    cached_tokens: int


class Usage(Payload, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PromptLogprob(Payload, kw_only=True):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]


class CompletionLogprobs(Payload, kw_only=True):
    tokens: list[str] = msgspec.field(default_factory=list)
    token_logprobs: list[float | None] = msgspec.field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = msgspec.field(default_factory=list)
    text_offset: list[int] = msgspec.field(default_factory=list)


class CompletionChoice(Payload, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType | None = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(Payload, kw_only=True):
    """Also each chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
