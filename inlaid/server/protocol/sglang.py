"""SGLang's own routes: /generate and what its clients ask beside it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inlaid.server.protocol.base import Body, Payload

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


NativeLogprob = tuple[float | None, int, str | None]
NativeLogprobs = list[NativeLogprob] | msgspec.UnsetType
NativeTopLogprobs = list[list[NativeLogprob] | None] | msgspec.UnsetType


class Finish(Payload, kw_only=True):
    type: Literal["stop", "length", "abort"]
    matched: str | int | msgspec.UnsetType = msgspec.UNSET  # the stop string or token
    length: int | msgspec.UnsetType = msgspec.UNSET


class MetaInfo(Payload, kw_only=True):
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


class Generation(Payload, kw_only=True):
    """SGLang's answer to one prompt, and each event of its stream: all of the answer so far."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | msgspec.UnsetType = msgspec.UNSET  # of a batch, streamed


class ServerInfo(Payload, kw_only=True):
    """SGLang's /get_server_info."""

    model_path: str
    tokenizer_path: str
    served_model_name: str
    version: str
    context_length: int
    max_total_num_tokens: int
    max_running_requests: int
    internal_states: list[dict[str, float]]


class ModelSummary(Payload, kw_only=True):
    """SGLang's /get_model_info."""

    model_path: str
    tokenizer_path: str
    is_generation: bool = True
    max_model_len: int


class LoadResult(Payload, kw_only=True):
    """SGLang's answer to loading and unloading."""

    success: bool = True
    loaded_adapters: dict[str, str]
    error_message: str = ""
