"""ClientRequest, made of a decoded body: the adapter that it names, its prompts, and its sampling parameters under the
names of OpenAI, vLLM and SGLang. Words become tokens in `inlaid.text`; fields that cannot be obeyed are refused.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from inlaid.engine.refusal import Refused
from inlaid.engine.request import Grammar, NewRequest, SamplingParams
from inlaid.server import safety
from inlaid.server.errors import BadRequest, refused
from inlaid.server.protocol.openai import ChatBody, CompletionBody, GenerateBody, Message, Tool
from inlaid.server.service import Service
from inlaid.text.encoder import check_template_options, last_tokens
from inlaid.text.nesting import check_depth
from inlaid.text.params import schema_grammar
from inlaid.text.stream import Piece

_MAX_ID_CHARS = 256  # it comes back with every event of a stream
_SAME_NAMES = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
)


@dataclass
class Outcome:
    """Counts of what has been answered so far, all answers together, for the access log."""

    num_tokens: int = 0
    num_cached: int = 0
    first: float | None = None  # when the first token came, on the monotonic clock
    reasons: set[str] = field(default_factory=set)  # why answers ended

    def note(self, piece: Piece, is_first: bool) -> None:
        """Count a piece of an answer; the tokens of a prompt count with the first of its answers."""
        if piece.tokens and self.first is None:
            self.first = time.monotonic()
        self.num_tokens += len(piece.tokens)
        self.num_cached += piece.num_cached if is_first else 0
        if piece.finish_reason is not None:
            self.reasons.add(piece.finish_reason.value)


@dataclass(frozen=True)
class ClientRequest:
    """One request of a client: an engine request for each answer, prompt by prompt."""

    id: str
    created: int
    model: str  # the base or the adapter, as the client calls it
    requests: list[NewRequest]
    num_answers: int  # per prompt
    texts: list[str | None]  # of each prompt; None: it came as tokens, or was truncated
    outcome: Outcome = field(default_factory=Outcome)

    def prompt_of(self, index: int) -> list[int]:
        """Return the prompt's tokens of an answer."""
        return self.requests[index].prompt

    def text_of(self, index: int) -> str | None:
        """Return the prompt's text of an answer, if it is known."""
        return self.texts[index // self.num_answers]


async def _find(service: Service, model: str, param: str = "model") -> str | None:
    """Resolve a name, after the resolver, if there is one, has looked for an adapter that is not known yet."""
    resolver = service.resolver
    try:
        adapter = service.resolve(model, param)
    except Refused:
        served = None if resolver is None else await resolver.resolve(service.names.adapter_in(model))
        if served is None or served not in service.engine.adapters:
            raise
        return served
    if resolver is not None:
        resolver.note_use(adapter)
    return adapter


async def _target(service: Service, body: GenerateBody) -> tuple[str | None, str]:
    """Return the adapter, and its name as the client writes it: in `model`, or as SGLang's clients do in `lora_path`,
    beside `model` or alone."""
    adapter = await _find(service, body.model)
    if not body.lora_path:
        return adapter, body.model or service.names.base
    named = await _find(service, body.lora_path, "lora_path")
    if named is None:
        raise BadRequest(f"lora_path is {body.lora_path!r}, the base; leave it out, or name an adapter", "lora_path")
    if adapter not in (None, named):
        raise BadRequest(f"model names adapter {adapter!r}, lora_path {named!r}", "lora_path")
    return named, body.lora_path


def _max_tokens(body: GenerateBody) -> int | None:
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


async def completion_request(
    service: Service, body: CompletionBody, headers: Mapping[str, str], size: int
) -> ClientRequest:
    """Prepare a completion, whose body has `size` bytes."""
    adapter, model = await _target(service, body)
    return await _prepared(service, adapter, size, partial(_completion, service, body, headers, adapter, model))


def _completion(
    service: Service, body: CompletionBody, headers: Mapping[str, str], adapter: str | None, model: str
) -> ClientRequest:
    _refuse_unserved(body)
    if body.suffix:
        raise BadRequest("suffix is not supported: the models served here do not fill in the middle", "suffix")
    add_special = body.add_special_tokens if body.add_special_tokens is not None else True
    whole = service.encoder.prompts(body.prompt, add_special)
    prompts = [last_tokens(prompt, body.truncate_prompt_tokens) for prompt in whole]
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    texts = [
        text if isinstance(text, str) and prompt is all_of_it else None
        for text, prompt, all_of_it in zip(given, prompts, whole, strict=False)  # of token ids there is one prompt
    ]
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    max_tokens = 16 if (asked := _max_tokens(body)) is None else asked
    if max_tokens == 0 and (not body.echo or body.logprobs is None):
        raise BadRequest("max_tokens is 0, which is allowed only with echo and logprobs", "max_tokens")
    logprobs = {"logprobs": body.logprobs, "prompt_logprobs": prompt_logprobs}
    requests = _requests(service, body, headers, adapter, prompts, max_tokens, logprobs)
    return _client_request("cmpl", body, model, requests, texts)


async def chat_request(service: Service, body: ChatBody, headers: Mapping[str, str], size: int) -> ClientRequest:
    """Prepare a chat completion, whose body has `size` bytes."""
    adapter, model = await _target(service, body)
    return await _prepared(service, adapter, size, partial(_chat, service, body, headers, adapter, model))


async def _prepared(
    service: Service, adapter: str | None, size: int, prepare: Callable[[], ClientRequest]
) -> ClientRequest:
    """Prepare a request, and count it if it is refused."""
    try:
        return await service.offload.run(size, prepare)
    except Refused as error:
        service.metrics.refuse(adapter, refused(error.refusal).status)
        raise


def _chat(
    service: Service, body: ChatBody, headers: Mapping[str, str], adapter: str | None, model: str
) -> ClientRequest:
    _refuse_unserved(body)
    tools = body.tools if body.tool_choice != "none" else None
    tokens = chat_tokens(service, body.messages, tools, template_options(body), bool(body.add_special_tokens))
    prompt = last_tokens(tokens, body.truncate_prompt_tokens)
    max_tokens = _max_tokens(body)
    if max_tokens is None:
        max_tokens = max(1, service.encoder.max_model_len - len(prompt))
    if body.tool_choice not in (None, "none", "auto"):
        raise BadRequest("tool_choice can be none or auto; to force a form, use response_format", "tool_choice")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    logprobs = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    requests = _requests(service, body, headers, adapter, [prompt], max_tokens, logprobs)
    return _client_request("chatcmpl", body, model, requests, [None])


def template_options(body: Any) -> dict[str, Any]:
    """Return what the chat template is told besides messages and tools."""
    options = dict(body.chat_template_kwargs or {})
    check_template_options(options)
    if body.add_generation_prompt is not None:
        options["add_generation_prompt"] = body.add_generation_prompt
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise BadRequest("continue_final_message and add_generation_prompt exclude each other")
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    if getattr(body, "reasoning_effort", None) is not None:
        options["reasoning_effort"] = body.reasoning_effort
    return options


def chat_tokens(
    service: Service,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    options: dict[str, Any],
    add_special_tokens: bool = False,
) -> list[int]:
    """Return the tokens of a conversation."""
    service.encoder.check_messages(len(messages))
    plain = [msgspec.to_builtins(message) for message in messages]
    plain_tools = None if tools is None else [msgspec.to_builtins(tool) for tool in tools]
    return service.encoder.conversation(plain, plain_tools, options, add_special_tokens)


def _refuse_unserved(body: GenerateBody) -> None:
    if body.use_beam_search:
        raise BadRequest("use_beam_search is not supported; use n, or a lower temperature", "use_beam_search")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise BadRequest("best_of must equal n: answers are not ranked here", "best_of")
    if body.spaces_between_special_tokens is False:
        raise BadRequest(
            "spaces_between_special_tokens cannot be false: the tokenizer decides", "spaces_between_special_tokens"
        )
    check_depth("metadata", body.metadata)
    if body.request_id is not None and len(body.request_id) > _MAX_ID_CHARS:
        raise BadRequest(f"request_id has {len(body.request_id)} characters; at most {_MAX_ID_CHARS}", "request_id")


def _requests(
    service: Service,
    body: GenerateBody,
    headers: Mapping[str, str],
    adapter: str | None,
    prompts: list[list[int]],
    max_tokens: int,
    logprobs: dict[str, int | None],
) -> list[NewRequest]:
    """Return the engine's requests."""
    num_answers = 1 if body.n is None else body.n
    service.encoder.check_count(num_answers, len(prompts))
    words = service.encoder.bad_words(body.bad_words or ())
    key = secrets.token_hex(12)
    return service.encoder.requests(
        (f"{key}-{index}" for index in range(num_answers * len(prompts))),
        prompts,
        sampling_params(body, max_tokens=max_tokens, bad_words=words, **logprobs),
        num_answers,
        adapter=adapter,
        tenant=safety.tenant(service.engine.config.scheduler.tenant, service.keys, headers, body.user, adapter),
        priority=_priority(body),
        deadline=_deadline(body),
    )


def _client_request(
    prefix: str, body: GenerateBody, model: str, requests: list[NewRequest], texts: list[str | None]
) -> ClientRequest:
    name = f"{prefix}-{body.request_id or secrets.token_hex(16)}"
    return ClientRequest(name, int(time.time()), model, requests, 1 if body.n is None else body.n, texts)


def _priority(body: GenerateBody) -> int:
    priority = body.priority or 0
    if abs(priority) > 2**31:
        raise BadRequest(f"priority is {priority}; it must be within 32 bits", "priority")
    return priority


def _deadline(body: GenerateBody) -> float | None:
    """Return the deadline on the engine's clock, which is the machine's monotonic one."""
    if body.deadline is None:
        return None
    if not 0 < body.deadline <= 86_400:
        raise BadRequest(f"deadline is {body.deadline} s; it must be above 0 and at most a day", "deadline")
    return time.monotonic() + body.deadline


def sampling_params(body: GenerateBody, **changes: Any) -> SamplingParams:
    """Return what the client gave, and the changes, over the engine's defaults; None is a default. A seed is drawn
    where the client gave none."""
    values: dict[str, Any] = {"seed": secrets.randbits(62)}
    values |= {name: value for name in _SAME_NAMES if (value := getattr(body, name)) is not None}
    values |= {name: value for name, value in changes.items() if value is not None}
    if body.stop:
        values["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids:
        values["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.allowed_token_ids:
        values["allowed_token_ids"] = tuple(body.allowed_token_ids)
    return SamplingParams(grammar=_grammar(body), **values)


def _grammar(body: GenerateBody) -> Grammar | None:
    """Return the one constraint among the names that OpenAI, vLLM and SGLang have for them."""
    given: dict[str, Grammar] = {}
    for name, schema in (("guided_json", body.guided_json), ("json_schema", body.json_schema)):
        if schema is not None:
            given[name] = schema_grammar(name, schema)
    for name, regex in (("guided_regex", body.guided_regex), ("regex", body.regex)):
        if regex is not None:
            given[name] = Grammar(regex=regex)
    for name, text in (("guided_grammar", body.guided_grammar), ("ebnf", body.ebnf)):
        if text is not None:
            given[name] = Grammar(lark=text)
    if body.guided_choice is not None:
        given["guided_choice"] = Grammar(choice=tuple(body.guided_choice))
    if (output := body.structured_outputs) is not None:
        if output.json is not None:
            given["structured_outputs.json"] = schema_grammar("structured_outputs", output.json)
        if output.regex is not None:
            given["structured_outputs.regex"] = Grammar(regex=output.regex)
        if output.grammar is not None:
            given["structured_outputs.grammar"] = Grammar(lark=output.grammar)
        if output.choice is not None:
            given["structured_outputs.choice"] = Grammar(choice=tuple(output.choice))
        if output.json_object:
            given["structured_outputs.json_object"] = Grammar(json_object=True)
    if (form := _format_grammar(body)) is not None:
        given["response_format"] = form
    if len(given) > 1:
        raise BadRequest(f"only one constraint is possible; given: {', '.join(given)}")
    return next(iter(given.values()), None)


def _format_grammar(body: GenerateBody) -> Grammar | None:
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Grammar(json_object=True)
    if form.json_schema is None or form.json_schema.schema is None:
        raise BadRequest("response_format of type json_schema needs json_schema.schema", "response_format")
    return schema_grammar("response_format", form.json_schema.schema)
