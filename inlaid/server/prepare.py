"""From a request's body to what the engine takes: which adapter, which tokens, which sampling parameters. What cannot
be obeyed is refused here, by name.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from inlaid.engine.request import Grammar, NewRequest, SamplingParams
from inlaid.server import safety
from inlaid.server.errors import BadRequest, NotFound
from inlaid.server.protocol import ChatBody, CompletionBody, GenerateBody, Message, Tool
from inlaid.server.service import Service
from inlaid.text.params import MAX_BAD_WORDS, check
from inlaid.text.tokenizer import Tokenizer

_LONG_TEXT = 20_000  # characters; longer texts are tokenized in a thread
_SAME_NAMES = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
)


@dataclass(frozen=True)
class Target:
    """What `model` names: the base or an adapter, and how the answer calls it."""

    adapter: str | None
    name: str


@dataclass(frozen=True)
class Prompt:
    text: str | None  # None: it came as tokens
    tokens: list[int]


@dataclass(frozen=True)
class Job:
    """One request of a client: its prompts, and an engine request for each answer, prompt by prompt."""

    id: str
    created: int
    target: Target
    prompts: list[Prompt]
    requests: list[NewRequest]
    num_answers: int  # per prompt

    def prompt_of(self, index: int) -> Prompt:
        return self.prompts[index // self.num_answers]


def resolve(service: Service, model: str, field: str = "model") -> Target:
    """The base by its name (or none), an adapter by its name, or base:adapter."""
    base = service.model_name
    adapter = model.removeprefix(f"{base}:") if model.startswith(f"{base}:") else model
    if adapter in service.engine.adapters and adapter != base:
        return Target(adapter, model)
    if model in ("", base, service.model_path):
        return Target(None, model or base)
    raise NotFound(
        f"model {model!r} does not exist here; GET /v1/models lists the base {base!r} and its adapters",
        field,
        "model_not_found",
    )


async def _find(service: Service, model: str, field: str = "model") -> Target:
    """What a name stands for, after the resolver, if there is one, has looked for an adapter that is not known yet."""
    try:
        return resolve(service, model, field)
    except NotFound:
        if service.resolver is None:
            raise
    await service.resolver.resolve(model.removeprefix(f"{service.model_name}:"))
    return resolve(service, model, field)


async def _target(service: Service, body: GenerateBody) -> Target:
    """What `model` names, or the adapter that SGLang's clients name in `lora_path`, beside `model` or alone."""
    target = await _find(service, body.model)
    if not body.lora_path:
        return target
    named = await _find(service, body.lora_path, "lora_path")
    if named.adapter is None:
        raise BadRequest(f"lora_path is {body.lora_path!r}, the base; leave it out, or name an adapter", "lora_path")
    if target.adapter not in (None, named.adapter):
        raise BadRequest(f"model names adapter {target.adapter!r}, lora_path {named.adapter!r}", "lora_path")
    return named


def _max_tokens(body: GenerateBody) -> int | None:
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


async def completion_job(service: Service, body: CompletionBody, headers: Mapping[str, str]) -> Job:
    target = await _target(service, body)
    _refuse_unserved(body)
    if body.suffix:
        raise BadRequest("suffix is not supported: the models served here do not fill in the middle", "suffix")
    add_special = body.add_special_tokens if body.add_special_tokens is not None else True
    prompts = await _prompts(service, body.prompt, add_special)
    prompts = [_truncate(prompt, body.truncate_prompt_tokens) for prompt in prompts]
    changes: dict[str, Any] = {"logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        changes["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    max_tokens = 16 if (given := _max_tokens(body)) is None else given
    if max_tokens == 0 and changes.get("prompt_logprobs") is None:
        raise BadRequest("max_tokens is 0, which is allowed only with echo and logprobs", "max_tokens")
    return _job(service, body, headers, target, prompts, max_tokens, changes, "cmpl")


async def chat_job(service: Service, body: ChatBody, headers: Mapping[str, str]) -> Job:
    target = await _target(service, body)
    _refuse_unserved(body)
    tokens = await chat_tokens(
        service,
        body.messages,
        body.tools if body.tool_choice != "none" else None,
        template_options(body),
        bool(body.add_special_tokens),
    )
    prompt = _truncate(Prompt(None, tokens), body.truncate_prompt_tokens)
    max_tokens = _max_tokens(body)
    if max_tokens is None:
        max_tokens = max(1, service.max_model_len - len(prompt.tokens))
    if body.tool_choice not in (None, "none", "auto"):
        raise BadRequest("tool_choice can be none or auto; to force a form, use response_format", "tool_choice")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    changes = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    return _job(service, body, headers, target, [prompt], max_tokens, changes, "chatcmpl")


def template_options(body: Any) -> dict[str, Any]:
    """What the chat template is told besides messages and tools."""
    options = dict(body.chat_template_kwargs or {})
    safety.check_depth("chat_template_kwargs", options)
    for name in ("messages", "conversation", "tools", "chat_template", "tokenize", "return_tensors", "return_dict"):
        if name in options:
            raise BadRequest(f"chat_template_kwargs must not have {name!r}", "chat_template_kwargs")
    if body.add_generation_prompt is not None:
        options["add_generation_prompt"] = body.add_generation_prompt
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise BadRequest("continue_final_message and add_generation_prompt exclude each other")
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    if getattr(body, "reasoning_effort", None) is not None:
        options["reasoning_effort"] = body.reasoning_effort
    return options


async def chat_tokens(
    service: Service,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    options: dict[str, Any],
    add_special_tokens: bool = False,
) -> list[int]:
    """Tokens of a conversation; the template writes the special tokens itself."""
    plain = [_plain_message(message) for message in messages]
    plain_tools = None if tools is None else [msgspec.to_builtins(tool) for tool in tools]
    safety.check_depth("tools", plain_tools)
    tokenizer = service.tokenizer
    size = sum(len(message.get("content") or "") for message in plain)
    _check_size(service, "messages", size)

    def render() -> list[int]:
        text = tokenizer.render(plain, plain_tools, **options)
        return tokenizer.encode(text, add_special_tokens)

    return await asyncio.to_thread(render) if size > _LONG_TEXT else render()


def _plain_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: content as one text, arguments of tool calls as objects."""
    plain: dict[str, Any] = msgspec.to_builtins(message)
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content)
    if message.role == "developer":
        plain["role"] = "system"
    for call in plain.get("tool_calls") or ():
        call["type"] = "function"
        try:
            call["function"]["arguments"] = msgspec.json.decode(call["function"]["arguments"])
        except msgspec.DecodeError:
            continue  # some models write what is not JSON; the template gets the text
        safety.check_depth("messages", call["function"]["arguments"])
    return plain


async def _prompts(service: Service, given: str | list[Any], add_special: bool) -> list[Prompt]:
    """Prompts in any of the four forms."""
    if isinstance(given, str):
        return [await _text_prompt(service, given, add_special)]
    if not given:
        raise BadRequest("prompt is an empty list", "prompt")
    if all(type(item) is int for item in given):
        return [Prompt(None, _checked_tokens(service, given))]
    if len(given) > service.config.max_prompts:
        raise BadRequest(f"{len(given)} prompts; at most {service.config.max_prompts} in one request", "prompt")
    if all(isinstance(item, str) for item in given):
        return [await _text_prompt(service, item, add_special) for item in given]
    if all(isinstance(item, list) and all(type(token) is int for token in item) for item in given):
        return [Prompt(None, _checked_tokens(service, item)) for item in given]
    raise BadRequest(
        "prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids", "prompt"
    )


async def _text_prompt(service: Service, text: str, add_special: bool) -> Prompt:
    _check_size(service, "prompt", len(text))
    tokens = await encode(service.tokenizer, text, add_special)
    return Prompt(text, tokens)


async def encode(tokenizer: Tokenizer, text: str, add_special: bool) -> list[int]:
    """Long texts in a thread, so that others need not wait."""
    if len(text) > _LONG_TEXT:
        return await asyncio.to_thread(tokenizer.encode, text, add_special)
    return tokenizer.encode(text, add_special)


def _check_size(service: Service, field: str, num_chars: int) -> None:
    """A text that is too long whatever its tokens are is not worth tokenizing."""
    most = service.max_model_len * service.tokenizer.max_token_bytes
    if num_chars > most:
        raise BadRequest(
            f"{field} has {num_chars} characters, more than {service.max_model_len} tokens can hold", field
        )


def _checked_tokens(service: Service, tokens: list[int]) -> list[int]:
    for token in tokens:
        if not 0 <= token < service.vocab_size:
            raise BadRequest(f"prompt has token {token}; the vocabulary has 0 to {service.vocab_size - 1}", "prompt")
    return tokens


def _truncate(prompt: Prompt, count: int | None) -> Prompt:
    """The last tokens, when the client asks for that; never of ourselves."""
    if count is None:
        return prompt
    if count < 1:
        raise BadRequest(f"truncate_prompt_tokens is {count}; it must be at least 1", "truncate_prompt_tokens")
    return Prompt(None, prompt.tokens[-count:]) if len(prompt.tokens) > count else prompt


def _refuse_unserved(body: GenerateBody) -> None:
    if body.use_beam_search:
        raise BadRequest("use_beam_search is not supported; use n, or a lower temperature", "use_beam_search")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise BadRequest("best_of must equal n: answers are not ranked here", "best_of")
    if body.spaces_between_special_tokens is False:
        raise BadRequest(
            "spaces_between_special_tokens cannot be false: the tokenizer decides", "spaces_between_special_tokens"
        )
    safety.check_depth("metadata", body.metadata)


def _job(
    service: Service,
    body: GenerateBody,
    headers: Mapping[str, str],
    target: Target,
    prompts: list[Prompt],
    max_tokens: int,
    changes: dict[str, Any],
    prefix: str,
) -> Job:
    num_answers = 1 if body.n is None else body.n
    most = service.config.max_prompts
    if not 1 <= num_answers * len(prompts) <= most:
        raise BadRequest(f"n is {num_answers} with {len(prompts)} prompts; 1 to {most} answers in one request", "n")
    words = _spellings(service.tokenizer, body.bad_words or ())
    params = sampling_params(body, max_tokens, {**changes, "bad_words": words})
    check(params, service.vocab_size)
    name = f"{prefix}-{body.request_id or secrets.token_hex(16)}"
    key = secrets.token_hex(12)
    tenant = safety.tenant(service.engine.config.scheduler.tenant, headers, body.user, target.adapter)
    requests = [
        NewRequest(
            id=f"{key}-{index}",
            prompt=prompts[index // num_answers].tokens,
            params=_seeded(params, index % num_answers),
            adapter=target.adapter,
            tenant=tenant,
            priority=_priority(body),
            deadline=_deadline(body),
        )
        for index in range(num_answers * len(prompts))
    ]
    return Job(name, int(time.time()), target, prompts, requests, num_answers)


def _spellings(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each word's tokens, with a space before it and without."""
    if len(words) > MAX_BAD_WORDS // 2:
        raise BadRequest(f"bad_words has {len(words)} entries; at most {MAX_BAD_WORDS // 2}", "bad_words")
    spelled = [tuple(tokenizer.encode(space + word.lstrip(), False)) for word in words for space in ("", " ")]
    return tuple(dict.fromkeys(spelled))


def _seeded(params: SamplingParams, answer: int) -> SamplingParams:
    """Each of n answers has a seed of its own, the first the one asked for."""
    if params.greedy:
        return params
    seed = secrets.randbits(62) if params.seed is None else params.seed + answer
    return msgspec.structs.replace(params, seed=(seed + 2**63) % 2**64 - 2**63)


def _priority(body: GenerateBody) -> int:
    priority = body.priority or 0
    if abs(priority) > 2**31:
        raise BadRequest(f"priority is {priority}; it must be within 32 bits", "priority")
    return priority


def _deadline(body: GenerateBody) -> float | None:
    """On the engine's clock, which is the machine's monotonic one."""
    if body.deadline is None:
        return None
    if not 0 < body.deadline <= 86_400:
        raise BadRequest(f"deadline is {body.deadline} s; it must be above 0 and at most a day", "deadline")
    return time.monotonic() + body.deadline


def sampling_params(body: GenerateBody, max_tokens: int, changes: dict[str, Any]) -> SamplingParams:
    """What was given, over the engine's defaults."""
    values: dict[str, Any] = {"max_tokens": max_tokens, "seed": body.seed}
    values |= {name: value for name in _SAME_NAMES if (value := getattr(body, name)) is not None}
    values |= {name: value for name, value in changes.items() if value is not None}
    if body.stop:
        values["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids:
        values["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.allowed_token_ids:
        values["allowed_token_ids"] = tuple(body.allowed_token_ids)
    values["grammar"] = _grammar(body)
    return SamplingParams(**values)


def _grammar(body: GenerateBody) -> Grammar | None:
    """The one constraint among the names that OpenAI, vLLM and SGLang have for them."""
    given: dict[str, Grammar] = {}
    if body.guided_json is not None:
        given["guided_json"] = _schema("guided_json", body.guided_json)
    if body.json_schema is not None:
        given["json_schema"] = _schema("json_schema", body.json_schema)
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
            given["structured_outputs.json"] = _schema("structured_outputs", output.json)
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
    return _schema("response_format", form.json_schema.schema)


def _schema(field: str, schema: str | dict[str, Any]) -> Grammar:
    safety.check_depth(field, schema)
    return Grammar(json_schema=schema if isinstance(schema, str) else msgspec.json.encode(schema).decode())
