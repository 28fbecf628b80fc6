"""The wire: how a request is written and a stream's event read, for each kind of server.

`openai` (completions) and `openai-chat` fit inlaid, vLLM, SGLang and any other OpenAI-compatible server;
`slora` is S-LoRA's `/generate_stream`. Used by `perf.client` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from inlaid.workload.plan import PlannedRequest
from inlaid.workload.prompts import Prompt

Backend = Literal["openai", "openai-chat", "slora"]


class Event(msgspec.Struct, frozen=True):
    """One message of a stream. `has_token` is true when it carries output."""

    text: str = ""
    has_token: bool = False
    done: bool = False
    refused: bool = False
    error: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class WireOptions(msgspec.Struct, frozen=True):
    model: str
    ignore_eos: bool = True
    temperature: float = 0.0
    send_tenant: bool = True
    extra_body: dict[str, Any] = {}


class Protocol(msgspec.Struct, frozen=True):
    path: str
    body: Callable[[PlannedRequest, WireOptions], dict[str, Any]]
    parse: Callable[[bytes], Event]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _OpenAIChunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _SloraToken(msgspec.Struct):
    text: str = ""


class _SloraChunk(msgspec.Struct):
    token: _SloraToken | None = None
    finished: bool | int = False


_openai_chunk = msgspec.json.Decoder(_OpenAIChunk)
_slora_chunk = msgspec.json.Decoder(_SloraChunk)


def _parse_openai(data: bytes) -> Event:
    if data == b"[DONE]":
        return Event(done=True)
    chunk = _openai_chunk.decode(data)
    if chunk.error is not None:
        return Event(error=str(chunk.error)[:300])
    usage = chunk.usage or _Usage()
    counts = (usage.prompt_tokens or None, usage.completion_tokens if chunk.usage else None)
    if not chunk.choices:
        return Event(prompt_tokens=counts[0], completion_tokens=counts[1])
    choice = chunk.choices[0]
    if choice.finish_reason in ("abort", "error"):
        return Event(error=f"the server ended the stream with finish_reason {choice.finish_reason}")
    delta = choice.delta or _Delta()
    text = choice.text or delta.content or delta.reasoning_content or ""
    return Event(text, bool(text or delta.tool_calls), choice.finish_reason is not None, False, "", *counts)


def _parse_slora(data: bytes) -> Event:
    chunk = _slora_chunk.decode(data)
    if chunk.finished is not True and chunk.finished is not False and chunk.finished < 0:
        return Event(refused=True, error="rejected by the server's scheduler")
    text = chunk.token.text if chunk.token else ""
    return Event(text, chunk.token is not None, bool(chunk.finished))


def _sampling(request: PlannedRequest, options: WireOptions) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": request.adapter or options.model,
        "max_tokens": request.output_len,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.send_tenant and request.tenant:
        body["user"] = request.tenant
    return body | options.extra_body


def _openai_body(request: PlannedRequest, options: WireOptions) -> dict[str, Any]:
    return {"prompt": request.prompt} | _sampling(request, options)


def _chat_body(request: PlannedRequest, options: WireOptions) -> dict[str, Any]:
    content = _text(request.prompt, "openai-chat")
    return {"messages": [{"role": "user", "content": content}]} | _sampling(request, options)


def _slora_body(request: PlannedRequest, options: WireOptions) -> dict[str, Any]:
    parameters = {
        "do_sample": options.temperature > 0,
        "ignore_eos": options.ignore_eos,
        "max_new_tokens": request.output_len,
    }
    return {
        "model_dir": options.model,
        "lora_dir": request.adapter or "",
        "inputs": _text(request.prompt, "slora"),
        "parameters": parameters | options.extra_body,
        "req_id": str(request.index),
    }


def _text(prompt: Prompt, backend: str) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"{backend} takes text, not token ids: use --prompt-format text")
    return prompt


PROTOCOLS: Mapping[Backend, Protocol] = MappingProxyType(
    {
        "openai": Protocol("/v1/completions", _openai_body, _parse_openai),
        "openai-chat": Protocol("/v1/chat/completions", _chat_body, _parse_openai),
        "slora": Protocol("/generate_stream", _slora_body, _parse_slora),
    }
)
