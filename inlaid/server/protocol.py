"""The bodies of requests and answers, as OpenAI has them, with what vLLM and SGLang add. Routes decode into these and
`openapi.py` describes them; an unknown field is refused by name.

Every optional field may also be null. Fields under "no effect" are accepted because clients send them and leaving them
out cannot change an answer's tokens; all others are either obeyed or refused in `prepare.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

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

TokenIds = Annotated[
    list[Any],
    Meta(
        description="a list of token ids, or a list of lists of token ids",
        extra_json_schema={
            "anyOf": [
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        },
    ),
]


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a client sends."""


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


class StructuredOutputs(Body, frozen=True, kw_only=True):
    """vLLM's newer name for the guided_ fields."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GenerateBody(Body, frozen=True, kw_only=True):
    """What completions and chat completions have in common."""

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
    guided_grammar: Annotated[str, Meta(description="Lark, or GBNF")] | None = None
    regex: str | None = None  # SGLang's guided_regex
    json_schema: str | None = None  # SGLang's guided_json
    ebnf: str | None = None  # SGLang's guided_grammar
    user: str | None = None
    priority: int | None = None
    request_id: str | None = None
    deadline: Annotated[float, Meta(description="seconds from now to have the answer in")] | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    # no effect
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    guided_decoding_backend: str | None = None
    # one value only
    use_beam_search: bool | None = None


class CompletionBody(GenerateBody, frozen=True, kw_only=True):
    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class NativeSampling(Body, frozen=True, kw_only=True):
    """SGLang's sampling_params."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    sampling_seed: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: Annotated[str | list[str], Meta(description="empty only")] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None


class NativeBody(Body, frozen=True, kw_only=True):
    """SGLang's /generate. Where there is a list, it has an entry for each prompt."""

    text: str | list[str] | None = None
    input_ids: TokenIds | None = None
    sampling_params: NativeSampling | list[NativeSampling] | None = None
    lora_path: str | list[str | None] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    rid: str | list[str] | None = None
    # one value only
    image_data: None = None
    return_hidden_states: Literal[False] | None = None
    return_routed_experts: Literal[False] | None = None


class ContentPart(Body, frozen=True, kw_only=True):
    type: Literal["text"]
    text: str


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
    refusal: str | None = None
    annotations: list[Any] | None = None  # SDKs send answers back with these
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


class ChatBody(GenerateBody, frozen=True, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_ITEMS)]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = None  # no effect: the model's text is not parsed for calls


class TokenizeBody(Body, frozen=True, kw_only=True):
    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body, frozen=True, kw_only=True):
    model: str = ""
    tokens: Annotated[list[int], Meta(max_length=4_194_304)]


class LoadAdapterBody(Body, frozen=True, kw_only=True):
    lora_name: Annotated[str, Meta(min_length=1, max_length=256)]
    lora_path: Annotated[str, Meta(min_length=1, max_length=4096)]
    load_inplace: bool | None = None
    pinned: bool | None = None  # stays on the device; without it: as it was


class UnloadAdapterBody(Body, frozen=True, kw_only=True):
    lora_name: str
    lora_int_id: int | None = None  # no effect: names are unique


class SchedulerBody(Body, frozen=True, kw_only=True):
    """Any of them; what is left out stays."""

    policy: str | None = None
    options: dict[str, Any] | None = None
    weights: dict[str, float] | None = None
    limits: dict[str, dict[str, int | None]] | None = None
    max_num_waiting: int | None = None


# Answers


class Answer(msgspec.Struct, kw_only=True):
    """What we send."""


class CachedTokens(Answer, kw_only=True):
    cached_tokens: int


class Usage(Answer, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PromptLogprob(Answer, kw_only=True):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]


class CompletionLogprobs(Answer, kw_only=True):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(Answer, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType | None = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(Answer, kw_only=True):
    """Also each chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


NativeLogprob = tuple[float | None, int, str | None]
NativeLogprobs = list[NativeLogprob] | msgspec.UnsetType
NativeTopLogprobs = list[list[NativeLogprob] | None] | msgspec.UnsetType


class Finish(Answer, kw_only=True):
    type: Literal["stop", "length", "abort"]
    matched: str | int | msgspec.UnsetType = msgspec.UNSET  # the stop string or token
    length: int | msgspec.UnsetType = msgspec.UNSET


class MetaInfo(Answer, kw_only=True):
    id: str
    finish_reason: Finish | None = None
    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    e2e_latency: float | msgspec.UnsetType = msgspec.UNSET  # with the finish_reason
    input_token_logprobs: NativeLogprobs = msgspec.UNSET
    output_token_logprobs: NativeLogprobs = msgspec.UNSET
    input_top_logprobs: NativeTopLogprobs = msgspec.UNSET
    output_top_logprobs: NativeTopLogprobs = msgspec.UNSET


class Generation(Answer, kw_only=True):
    """SGLang's answer to one prompt, and each event of its stream: all there is so far."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | msgspec.UnsetType = msgspec.UNSET  # of a batch, streamed


class ServerInfo(Answer, kw_only=True):
    """SGLang's /get_server_info."""

    model_path: str
    tokenizer_path: str
    served_model_name: str
    version: str
    context_length: int
    max_total_num_tokens: int
    max_running_requests: int
    internal_states: list[dict[str, float]]


class TopLogprob(Answer, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob, kw_only=True):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer, kw_only=True):
    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(Answer, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Answer, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(Answer, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Delta(Answer, kw_only=True):
    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(Answer, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | msgspec.UnsetType | None = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(Answer, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class AdapterState(Answer, kw_only=True):
    """Where an adapter is and what has happened to it; the fields are AdapterInfo's."""

    name: str
    identity: str
    rank: int
    bytes: int
    tier: str
    requests: int
    load_seconds: float
    on_host: bool
    reads: int
    loads: int
    evictions: int
    hits: int
    copy_seconds: float
    pinned: bool


class ModelCard(Answer, kw_only=True):
    """As vLLM has it, and for an adapter its state beside that."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "inlaid"
    root: str
    parent: str | None = None
    max_model_len: int
    adapter: AdapterState | msgspec.UnsetType = msgspec.UNSET


class ModelList(Answer, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(Answer, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Answer, kw_only=True):
    prompt: str


class Health(Answer, kw_only=True):
    status: str
    restarts: int = 0


class Version(Answer, kw_only=True):
    version: str


class ModelSummary(Answer, kw_only=True):
    """SGLang's /get_model_info."""

    model_path: str
    tokenizer_path: str
    is_generation: bool = True
    max_model_len: int


class AdapterCard(AdapterState, kw_only=True):
    path: str


class AdapterList(Answer, kw_only=True):
    adapters: list[AdapterCard]
    max_loras: int


class LoadResult(Answer, kw_only=True):
    """SGLang's answer to loading and unloading."""

    success: bool = True
    loaded_adapters: dict[str, str]
    error_message: str = ""
