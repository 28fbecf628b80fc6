"""POST /generate, SGLang's own route: its names for the fields of completions, a batch of prompts each with its own
sampling parameters, and answers that grow when streamed: text, tokens and log probabilities from the beginning each
time. Every prompt is prepared as a completion. `/get_server_info` and `/flush_cache`, which SGLang's clients use beside
it, are here too.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import msgspec
from aiohttp import web

from inlaid import __version__
from inlaid.engine.refusal import Refused
from inlaid.engine.request import FinishReason, TokenLogprobs
from inlaid.server import answers
from inlaid.server.access import note_client
from inlaid.server.answers import LogprobBudget
from inlaid.server.bodies import body_size
from inlaid.server.completions import answer
from inlaid.server.errors import ApiError, BadRequest, refused
from inlaid.server.prepare import ClientRequest, completion_request
from inlaid.server.protocol.openai import CompletionBody
from inlaid.server.protocol.sglang import (
    Finish,
    Generation,
    MetaInfo,
    NativeBody,
    NativeLogprob,
    NativeSampling,
    ServerInfo,
)
from inlaid.server.service import SERVICE, Service
from inlaid.server.streaming import event, send
from inlaid.text.encoder import as_ids
from inlaid.text.stream import Piece
from inlaid.text.tokenizer import Tokenizer

_OURS: Mapping[str, str] = MappingProxyType(
    {
        "max_new_tokens": "max_tokens",
        "min_new_tokens": "min_tokens",
        "sampling_seed": "seed",
        "no_stop_trim": "include_stop_str_in_output",
    }
)
_THEIRS: Mapping[str, str] = MappingProxyType(
    {ours: theirs for theirs, ours in _OURS.items()}
    | {"logprobs": "top_logprobs_num", "prompt_logprobs": "top_logprobs_num"}
)
_PARTS = 128  # a stream sends no more than so many times its answer, and its first tokens one by one
_MAX_NEW_TOKENS = 128  # where the client says nothing


@dataclass(frozen=True)
class _Item:
    """One prompt of a batch, with its sampling parameters."""

    prompt: str | list[int]
    sampling: NativeSampling
    adapter: str | None
    top: int | None  # alternatives to each token; None: no log probabilities
    start: int  # the first prompt token whose log probability is wanted; -1: none


async def generate(request: web.Request, body: NativeBody) -> web.StreamResponse:
    """Continue a prompt, or each of a batch; SGLang's native request."""
    service, started = request.app[SERVICE], time.monotonic()
    items, several = _items(body)
    field = "text" if body.input_ids is None else "input_ids"
    size = body_size(request)
    client = note_client(request, await _client_request(service, items, request.headers, field, size))
    several = several or client.num_answers > 1
    names = _names(body, len(client.requests), several)
    growing = [
        _Growing(service.tokenizer, items[i // client.num_answers], names[i], client.prompt_of(i), started, body)
        for i in range(len(client.requests))
    ]
    if body.stream:
        return await send(request, _events(service, client, growing, several), service.config.stream_timeout)
    budget = LogprobBudget()
    async with aclosing(answers.all_pieces(service, client)) as arriving:
        async for index, piece in arriving:
            budget.spend(piece)
            growing[index].add(piece)
    made = [one.show() for one in growing]
    return answer(made if several else made[0])


async def _events(
    service: Service, client: ClientRequest, growing: Sequence[_Growing], several: bool
) -> AsyncGenerator[bytes, None]:
    """Yield each answer as far as it has come: with every token at first, later when it has grown by a part of its
    length, as each event repeats the whole."""
    budget = LogprobBudget()
    async with aclosing(answers.all_pieces(service, client)) as arriving:
        async for index, piece in arriving:
            budget.spend(piece)
            growing[index].add(piece)
            if piece.finish_reason or growing[index].is_due:
                shown = growing[index].show()
                yield event(msgspec.structs.replace(shown, index=index) if several else shown)


async def server_info(request: web.Request) -> web.Response:
    """Summarize the server as SGLang does; the engine's counters are under `internal_states`."""
    service = request.app[SERVICE]
    stats = await service.engine.call("stats")
    model = service.engine.model
    assert model is not None
    return answer(
        ServerInfo(
            model_path=service.root(request.headers),
            tokenizer_path=service.root(request.headers),
            served_model_name=service.names.base,
            version=__version__,
            context_length=service.encoder.max_model_len,
            max_total_num_tokens=(model.num_blocks - 1) * model.block_size,
            max_running_requests=service.engine.config.scheduler.max_num_seqs,
            internal_states=[stats],
        )
    )


async def flush_cache(request: web.Request) -> web.Response:
    """Forget every prompt in the prefix cache; what runs keeps its own. A body is not read."""
    await request.app[SERVICE].engine.call("flush_cache")
    return web.Response(text="Cache flushed.\n")


# Requests


def _items(body: NativeBody) -> tuple[list[_Item], bool]:
    """Return the prompts, and True if they came as a batch, which is answered by a list."""
    if (body.text is None) == (body.input_ids is None):
        raise BadRequest("give either text or input_ids", "text")
    given: Any = body.text if body.input_ids is None else body.input_ids
    if given == []:
        raise BadRequest("the list of prompts is empty", "text" if body.input_ids is None else "input_ids")
    several = isinstance(given, list) and isinstance(given[0], (str, list))
    prompts: list[Any] = given if several else [given]
    if body.text is None:
        prompts = [as_ids(one) if isinstance(one, list) else None for one in prompts]
        if None in prompts:
            raise BadRequest("input_ids must be a list of token ids, or a list of such lists", "input_ids")

    def each(name: str) -> list[Any]:
        value = getattr(body, name)
        if not isinstance(value, list):
            return [value] * len(prompts)
        if len(value) != len(prompts):
            raise BadRequest(f"{name} has {len(value)} entries for {len(prompts)} prompts", name)
        return value

    columns = ("sampling_params", "lora_path", "return_logprob", "top_logprobs_num", "logprob_start_len")
    return [
        _Item(prompt, sampling or NativeSampling(), adapter, (top or 0) if wanted else None, _start(at, sampling))
        for prompt, sampling, adapter, wanted, top, at in zip(prompts, *map(each, columns), strict=True)
    ], several


def _start(given: int | None, sampling: NativeSampling | None) -> int:
    """Return the first prompt token whose log probability is wanted. Left out, it means none, unless no token is made:
    SGLang's frontend language asks so."""
    if given is not None:
        return given
    return 0 if sampling is not None and sampling.max_new_tokens == 0 else -1


async def _client_request(
    service: Service, items: Sequence[_Item], headers: Mapping[str, str], field: str, size: int
) -> ClientRequest:
    """Prepare all prompts as one request of the client."""
    numbers = {item.sampling.n or 1 for item in items}
    if len(numbers) > 1:
        raise BadRequest("n must be the same for all prompts of a batch", "n")
    service.encoder.check_count(max(numbers), len(items))
    made = []
    for item in items:
        try:
            one = await completion_request(service, _completion(item), headers, size)
        except Refused as error:
            raise _in_their_words(refused(error.refusal), field) from error
        except ApiError as error:
            raise _in_their_words(error, field) from error
        if not -1 <= item.start <= len(one.prompt_of(0)):
            raise BadRequest(f"logprob_start_len is {item.start}; it must be within the prompt", "logprob_start_len")
        made.append(one)
    return replace(
        made[0],
        texts=[text for one in made for text in one.texts],
        requests=[request for one in made for request in one.requests],
    )


def _completion(item: _Item) -> CompletionBody:
    """Return a prompt of /generate as a completion. An answer without tokens is asked for its prompt's log
    probabilities, which `echo` gives."""
    given = msgspec.structs.asdict(item.sampling)
    if given.pop("stop_regex"):
        raise BadRequest("stop_regex is not supported; use stop, or end the answer with regex", "stop_regex")
    values = {_OURS.get(name, name): value for name, value in given.items() if value is not None}
    values.setdefault("max_tokens", _MAX_NEW_TOKENS)
    echo = (item.top is not None and item.start >= 0) or values["max_tokens"] == 0
    return CompletionBody(
        prompt=item.prompt, lora_path=item.adapter, echo=echo, logprobs=item.top or 0 if echo else item.top, **values
    )


def _in_their_words(error: ApiError, field: str) -> ApiError:
    """Return an error with the names of the fields that the client sent."""
    words = {**_THEIRS, "prompt": field}
    message = re.sub(r"\w+", lambda word: words.get(word[0], word[0]), error.message)
    param = None if error.param is None else words.get(error.param, error.param)
    return type(error)(message, param, error.code, error.retry_after)


def _names(body: NativeBody, count: int, several: bool) -> list[str]:
    """Return each answer's name: the client's, numbered where one name is for several."""
    if isinstance(body.rid, list):
        if len(body.rid) != count:
            raise BadRequest(f"rid has {len(body.rid)} entries for {count} answers", "rid")
        return body.rid
    name = body.rid or secrets.token_hex(16)
    return [f"{name}_{index}" for index in range(count)] if several else [name]


# Answers


class _Growing:
    """One answer as far as it has come, in SGLang's form."""

    def __init__(
        self, tokenizer: Tokenizer, item: _Item, name: str, prompt: Sequence[int], started: float, body: NativeBody
    ) -> None:
        self._text_of = tokenizer.token_text if body.return_text_in_logprobs else lambda token: None
        self._item = item
        self._prompt = prompt
        self._started = started
        self._text = ""
        self._tokens: list[int] = []
        self._num_shown = 0
        self._meta = MetaInfo(id=name, prompt_tokens=len(prompt))
        if item.top is not None:
            self._meta.input_token_logprobs, self._meta.output_token_logprobs = [], []
        if item.top:
            self._meta.input_top_logprobs, self._meta.output_top_logprobs = [], []

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self._text += piece.text
        self._tokens += piece.tokens
        meta = self._meta
        meta.completion_tokens = len(self._tokens)
        meta.cached_tokens = max(meta.cached_tokens, piece.num_cached)
        if piece.prompt_logprobs is not None and self._item.start >= 0:
            self._note(piece.prompt_logprobs[self._item.start :], meta.input_token_logprobs, meta.input_top_logprobs)
        self._note(piece.logprobs or (), meta.output_token_logprobs, meta.output_top_logprobs)
        if piece.finish_reason is not None:
            meta.finish_reason = self._finish(piece)
            meta.e2e_latency = time.monotonic() - self._started

    @property
    def is_due(self) -> bool:
        """True when enough tokens have come since the answer was last shown."""
        return len(self._tokens) - self._num_shown >= max(1, len(self._tokens) // _PARTS)

    def show(self) -> Generation:
        """Return the answer so far."""
        self._num_shown = len(self._tokens)
        return Generation(text=self._text, output_ids=self._tokens, meta_info=self._meta)

    def _note(self, listed: Sequence[TokenLogprobs | None], chosen: Any, top: Any) -> None:
        """Append log probabilities. `None` stands for a prompt's first token, which nothing predicts."""
        if not isinstance(chosen, list):
            return
        for item in listed:
            token = self._prompt[0] if item is None else item.token
            chosen.append((None if item is None else answers.finite(item.logprob), token, self._text_of(token)))
            if isinstance(top, list):
                top.append(None if item is None else [self._entry(*pair) for pair in item.top[: self._item.top]])

    def _entry(self, token: int, logprob: float) -> NativeLogprob:
        return answers.finite(logprob), token, self._text_of(token)

    def _finish(self, piece: Piece) -> Finish:
        if piece.finish_reason is FinishReason.LENGTH:
            return Finish(type="length", length=len(self._tokens))
        if piece.finish_reason is not FinishReason.STOP:
            return Finish(type="abort")
        return Finish(type="stop", matched=self._tokens[-1] if piece.stop_reason is None else piece.stop_reason)
