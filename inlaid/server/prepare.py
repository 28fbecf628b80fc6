"""ClientRequest, made of a decoded body: the adapter that it names, its prompts, and its sampling parameters under the
names of OpenAI, vLLM and SGLang. Words become tokens in `inlaid.text`; fields that cannot be obeyed are refused.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from inlaid.engine.refusal import Refused
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.server import safety
from inlaid.server.constraints import constraint
from inlaid.server.errors import BadRequest, refused
from inlaid.server.protocol.openai import CompletionBody, GenerateBody
from inlaid.server.service import Service
from inlaid.text.encoder import last_tokens
from inlaid.text.nesting import check_depth
from inlaid.text.params import MAX_PRIORITY
from inlaid.text.stream import Piece
from inlaid.text.tools.answer import AnswerForm

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
    """Counts of what has been answered so far, all answers together, for the log of requests."""

    num_tokens: int = 0
    num_cached: int = 0
    first: float | None = None  # when the first token came, on the monotonic clock
    last: float | None = None  # and the last
    queue_time: float | None = None  # until the answer that came first was scheduled
    adapter_time: float = 0.0  # of these seconds, waiting for its adapter,
    adapter_read: float = 0.0  # of these, while that was read from disk,
    adapter_copy: float = 0.0  # and while it was copied to the device
    host_time: float = 0.0  # the answers' share of the engine process's processor
    reasons: set[str] = field(default_factory=set)  # why answers ended

    def note(self, piece: Piece, is_first: bool) -> None:
        """Count a piece of an answer; the tokens of a prompt count with the first of its answers."""
        if piece.tokens:
            self.last = time.monotonic()
            if self.first is None:
                self.first, self.queue_time, self.adapter_time = self.last, piece.queue_time, piece.adapter_time
                self.adapter_read, self.adapter_copy = piece.adapter_read, piece.adapter_copy
        self.host_time += piece.host_time
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
    form: AnswerForm = field(default_factory=AnswerForm)  # how answers are read
    hint: str = ""  # what the client should know about its request

    def prompt_of(self, index: int) -> list[int]:
        """Return the prompt's tokens of an answer."""
        return self.requests[index].prompt

    def text_of(self, index: int) -> str | None:
        """Return the prompt's text of an answer, if it is known."""
        return self.texts[index // self.num_answers]


async def find(service: Service, model: str, param: str = "model") -> str | None:
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


async def target(service: Service, body: GenerateBody) -> tuple[str | None, str]:
    """Return the adapter, and its name as the client writes it: in `model`, or as SGLang's clients do in `lora_path`,
    beside `model` or alone."""
    adapter = await find(service, body.model)
    if not body.lora_path:
        return adapter, body.model or service.names.base
    named = await find(service, body.lora_path, "lora_path")
    if named is None:
        raise BadRequest(f"lora_path is {body.lora_path!r}, the base; leave it out, or name an adapter", "lora_path")
    if adapter not in (None, named):
        raise BadRequest(f"model names adapter {adapter!r}, lora_path {named!r}", "lora_path")
    return named, body.lora_path


def max_tokens_of(body: GenerateBody) -> int | None:
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


async def completion_request(
    service: Service, body: CompletionBody, headers: Mapping[str, str], size: int
) -> ClientRequest:
    """Prepare a completion, whose body has `size` bytes."""
    adapter, model = await target(service, body)
    return await prepared(service, adapter, size, partial(_completion, service, body, headers, adapter, model))


def _completion(
    service: Service, body: CompletionBody, headers: Mapping[str, str], adapter: str | None, model: str
) -> ClientRequest:
    refuse_unserved(body)
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
    max_tokens = 16 if (asked := max_tokens_of(body)) is None else asked
    if max_tokens == 0 and (not body.echo or body.logprobs is None):
        raise BadRequest("max_tokens is 0, which is allowed only with echo and logprobs", "max_tokens")
    logprobs = {"logprobs": body.logprobs, "prompt_logprobs": prompt_logprobs}
    requests = engine_requests(service, body, headers, adapter, prompts, max_tokens, logprobs)
    return client_request(service, "cmpl", body, model, requests, texts)


async def prepared(
    service: Service, adapter: str | None, size: int, prepare: Callable[[], ClientRequest], is_chat: bool = False
) -> ClientRequest:
    """Prepare a request whose body has `size` bytes, and count it if it is refused."""
    run = service.offload.run_chat if is_chat else service.offload.run
    try:
        return await run(size, prepare)
    except Refused as error:
        service.metrics.refuse(adapter, refused(error.refusal).status)
        raise


def refuse_unserved(body: GenerateBody) -> None:
    if body.use_beam_search:
        raise BadRequest("use_beam_search is not supported; use n, or a lower temperature", "use_beam_search")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise BadRequest("best_of must equal n: answers are not ranked here", "best_of")
    if body.spaces_between_special_tokens is False:
        raise BadRequest(
            "spaces_between_special_tokens cannot be false: the tokenizer decides", "spaces_between_special_tokens"
        )
    check_depth("metadata", body.metadata)
    for name in ("request_id", "rid", "cache_salt"):
        if len(getattr(body, name) or "") > _MAX_ID_CHARS:
            raise BadRequest(f"{name} has {len(getattr(body, name))} characters; at most {_MAX_ID_CHARS}", name)


def engine_requests(
    service: Service,
    body: GenerateBody,
    headers: Mapping[str, str],
    adapter: str | None,
    prompts: list[list[int]],
    max_tokens: int,
    changes: dict[str, Any],
) -> list[NewRequest]:
    """Return the engine's requests; `changes` are sampling parameters that the body has by other names."""
    num_answers = 1 if body.n is None else body.n
    service.encoder.check_count(num_answers, len(prompts))
    words = service.encoder.bad_words(body.bad_words or ())
    key = secrets.token_hex(12)
    return service.encoder.requests(
        (f"{key}-{index}" for index in range(num_answers * len(prompts))),
        prompts,
        sampling_params(body, max_tokens=max_tokens, bad_words=words, **changes),
        num_answers,
        adapter=adapter,
        tenant=safety.tenant(service.engine.config.scheduler.tenant, service.keys, headers, body.user, adapter),
        priority=priority_of(body.priority),
        deadline=_deadline(body),
        cache_salt=body.cache_salt or "",
        speculation=body.speculation is not False,
    )


def client_request(
    service: Service,
    prefix: str,
    body: GenerateBody,
    model: str,
    requests: list[NewRequest],
    texts: list[str | None],
) -> ClientRequest:
    """Return the client's request that these of the engine are."""
    name = f"{prefix}-{body.request_id or body.rid or secrets.token_hex(16)}"
    num_answers, hint = 1 if body.n is None else body.n, ""
    room = service.encoder.max_model_len - max(len(request.prompt) for request in requests)
    if (asked := max_tokens_of(body)) is not None and asked > room:
        hint = f"max_tokens is {asked}; the context has room for {room}"
    return ClientRequest(name, int(time.time()), model, requests, num_answers, texts, hint=hint)


def priority_of(given: int | None) -> int:
    """Return a priority that the engine takes."""
    priority = given or 0
    if abs(priority) > MAX_PRIORITY:
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
    values.setdefault("grammar", constraint(body))
    if body.stop:
        values["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids:
        values["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.allowed_token_ids:
        values["allowed_token_ids"] = tuple(body.allowed_token_ids)
    return SamplingParams(**values)
