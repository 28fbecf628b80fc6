"""LLM: the engine in this process, for scripts: `LLM(model).generate(prompts)`, and `chat` with the chat template."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from inlaid.config import EngineConfig, from_dict
from inlaid.engine.engine import Engine
from inlaid.engine.refusal import Refusal, RefusalKind, Refused
from inlaid.engine.request import FinishReason, NewRequest, Output, SamplingParams
from inlaid.progress import Bar
from inlaid.text.encoder import RequestEncoder
from inlaid.text.stream import Answer, Piece, TextStream
from inlaid.text.template import Message
from inlaid.text.tokenizer import Tokenizer
from inlaid.worker.build import build_engine

Conversation = Sequence[Message]
Inbox = deque[tuple[str, Piece | Refusal]]  # what has come for a request, by its id
_UNKNOWN_FAILURE = Refusal("the request failed in the engine", RefusalKind.FAULT)
_PAUSE = 0.001  # seconds, while adapters load and there is nothing to compute


class GenerationError(RuntimeError):
    """A request failed inside the engine."""


class Completion(Answer, kw_only=True):
    """One answer, with the tokens of its prompt."""

    prompt_tokens: list[int]


class LLM:
    """A model and its adapters, generating in this process.

    `settings` are fields of EngineConfig; scheduler, cache and adapter settings come as dicts or as their config.
    """

    def __init__(self, model: str, adapters: Mapping[str, str] | None = None, **settings: Any) -> None:
        config = settings.pop("config", None) or _config(model, settings)
        self._loaded = build_engine(config, adapters or {})
        self.engine: Engine = self._loaded.engine
        self.tokenizer = Tokenizer(self._loaded.model.folder)
        served = self._loaded.model
        self.encoder = RequestEncoder(self.tokenizer, served.vocab_size, served.max_model_len)
        self.block_size = served.block_size
        self.requests = RequestLoop(self.engine, self.tokenizer)
        self.ids = map(str, itertools.count())

    def close(self) -> None:
        """End the other processes of a tensor-parallel group; they also end with this one."""
        if self._loaded.lead is not None:
            self._loaded.lead.close()

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that are served."""
        return [info.name for info in self._loaded.adapters.list()]

    def load_adapter(self, name: str, path: str, in_place: bool = False) -> None:
        """Serve an adapter from a folder; with in_place it may replace one of that name."""
        started = time.monotonic()
        adapter = self._loaded.adapters.read(path)
        self._loaded.adapters.install(name, adapter, in_place, time.monotonic() - started)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""
        self._loaded.adapters.remove(name)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        progress: bool = True,
    ) -> list[Completion]:
        """Return an answer to each prompt, in order. Params and adapter: one for all, or one for each. Refused says
        what cannot be served; GenerationError says what failed."""
        tokens = [self._tokens(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        requests = self._requests(tokens, params, adapter)
        answers = {request.id: Completion(prompt_tokens=list(request.prompt)) for request in requests}
        with Bar(total=len(requests), desc="generating", delay=1, leave=False, disable=not progress) as bar:
            for request_id, piece in self._run(requests):
                answers[request_id].add(piece)
                bar.update(piece.finish_reason is not None)
        return [answers[request.id] for request in requests]

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        progress: bool = True,
        **template: Any,
    ) -> list[Completion]:
        """Return an answer to one conversation or several, each a list of messages; see generate. `template` is what
        the chat template is told beside them."""
        listed: Any = [conversations] if conversations and isinstance(conversations[0], dict) else conversations
        prompts = [self.encoder.conversation(one, **_options(template)) for one in listed]
        return self.generate(prompts, params, adapter, progress)

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, adapter: str | None = None
    ) -> Iterator[Piece]:
        """Yield one answer, piece by piece. Closing the iterator ends the request."""
        for _, piece in self._run(self._requests([self._tokens(prompt)], params, adapter)):
            yield piece

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        return self.encoder.text(prompt) if isinstance(prompt, str) else self.encoder.tokens(list(prompt))

    def _requests(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | Sequence[str | None] | None,
    ) -> list[NewRequest]:
        one = SamplingParams() if params is None else params
        each = [one] * len(prompts) if isinstance(one, SamplingParams) else list(one)
        adapters = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if not len(prompts) == len(each) == len(adapters):
            raise ValueError(f"{len(prompts)} prompts, {len(each)} params and {len(adapters)} adapters do not match")
        return [
            request
            for tokens, sampling, name in zip(prompts, each, adapters, strict=True)
            for request in self.encoder.requests(self.ids, [tokens], sampling, adapter=name)
        ]

    def _run(self, requests: Sequence[NewRequest]) -> Iterator[tuple[str, Piece]]:
        """Step until all have ended. Requests that are left when the caller goes away are aborted."""
        waiting = list(reversed(requests))
        running: set[str] = set()
        inbox: Inbox = deque()
        try:
            while waiting or running:
                while waiting and self.requests.add(waiting[-1], inbox):
                    running.add(waiting.pop().id)
                self.requests.step()
                while inbox:
                    request_id, piece = inbox.popleft()
                    if isinstance(piece, Refusal):
                        raise GenerationError(piece.message)
                    if piece.finish_reason is not None:
                        running.discard(request_id)
                    yield request_id, piece
        finally:
            for request_id in running:
                self.requests.abort(request_id)


class RequestLoop:
    """The engine in this process, stepped by all who have requests in it: each gets the pieces of its own."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._open: dict[str, tuple[TextStream, Inbox]] = {}

    def add(self, request: NewRequest, inbox: Inbox) -> bool:
        """Queue a request whose pieces, or whose failure, go to an inbox. Return False if the queue is full: try again
        after a step. Refused: the request can never be served."""
        try:
            self._engine.add(request)
        except Refused as error:
            if error.retry_after is None or not self._engine.has_work:
                raise
            return False
        self._open[request.id] = (TextStream(self._tokenizer, request.prompt, request.params), inbox)
        return True

    def step(self) -> None:
        """Take one turn of the engine."""
        for output in self._engine.step():
            if output.id in self._open:
                self._deliver(output)
        if self._engine.idle and self._open:
            time.sleep(_PAUSE)

    def abort(self, request_id: str) -> None:
        """End a request that nobody waits for any more."""
        if self._open.pop(request_id, None) is not None:
            self._engine.abort(request_id)

    def _deliver(self, output: Output) -> None:
        stream, inbox = self._open[output.id]
        if output.finish_reason is FinishReason.ERROR:
            del self._open[output.id]
            inbox.append((output.id, output.refusal or _UNKNOWN_FAILURE))
            return
        piece = stream.take(output)
        inbox.append((output.id, piece))
        if piece.finish_reason is not None:
            del self._open[output.id]
            if stream.stopped is not None:
                self._engine.abort(output.id, FinishReason.STOP, stream.num_tokens)


def _options(template: Mapping[str, Any]) -> dict[str, Any]:
    """Split what the chat template is told into tools and its other options."""
    options = dict(template)
    return {"tools": options.pop("tools", None), "options": options}


def _config(model: str, settings: Mapping[str, Any]) -> EngineConfig:
    """Return the configuration of settings, of which nested ones may be dicts."""
    plain = {"model": model, **settings}
    defaults = EngineConfig()
    for name in ("scheduler", "cache", "adapters", "speculation"):
        if isinstance(plain.get(name), dict):
            plain[name] = from_dict(type(getattr(defaults, name)), plain[name])
    return from_dict(EngineConfig, plain)
