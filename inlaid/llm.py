"""LLM: the engine in this process, for scripts: `LLM(model).generate(prompts)`, and `chat` with the chat template."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from inlaid.config import EngineConfig, from_dict
from inlaid.engine.engine import Engine
from inlaid.engine.refusal import Refused
from inlaid.engine.request import FinishReason, NewRequest, Output, SamplingParams
from inlaid.text.encoder import RequestEncoder
from inlaid.text.stream import Answer, Piece, TextStream
from inlaid.text.template import Message
from inlaid.text.tokenizer import Tokenizer
from inlaid.worker.build import build_engine

Conversation = Sequence[Message]
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
        self._encoder = RequestEncoder(self.tokenizer, served.vocab_size, served.max_model_len)
        self._ids = map(str, itertools.count())

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
        with tqdm(total=len(requests), desc="generating", delay=1, leave=False, disable=not progress) as bar:
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
        prompts = [self._encoder.conversation(one, **_options(template)) for one in listed]
        return self.generate(prompts, params, adapter, progress)

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, adapter: str | None = None
    ) -> Iterator[Piece]:
        """Yield one answer, piece by piece. Closing the iterator ends the request."""
        for _, piece in self._run(self._requests([self._tokens(prompt)], params, adapter)):
            yield piece

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        return self._encoder.text(prompt) if isinstance(prompt, str) else self._encoder.tokens(list(prompt))

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
            for request in self._encoder.requests(self._ids, [tokens], sampling, adapter=name)
        ]

    def _run(self, requests: Sequence[NewRequest]) -> Iterator[tuple[str, Piece]]:
        """Step until all have ended. Requests that are left when the caller goes away are aborted."""
        streams = {r.id: TextStream(self.tokenizer, r.prompt, r.params) for r in requests}
        waiting = list(reversed(requests))
        try:
            while streams:
                self._submit(waiting)
                for output in self.engine.step():
                    if output.id in streams:
                        yield output.id, self._take(streams, output)
                if self.engine.idle and streams:
                    time.sleep(_PAUSE)
        finally:
            self._abort(streams)

    def _submit(self, waiting: list[NewRequest]) -> None:
        """Add as many requests as the queue takes; the others wait until it has room."""
        while waiting:
            try:
                self.engine.add(waiting[-1])
            except Refused as error:
                if error.retry_after is None or not self.engine.has_work:
                    raise
                return
            waiting.pop()

    def _take(self, streams: dict[str, TextStream], output: Output) -> Piece:
        if output.finish_reason is FinishReason.ERROR:
            raise GenerationError(output.refusal.message if output.refusal else "the request failed in the engine")
        stream = streams[output.id]
        piece = stream.take(output)
        if piece.finish_reason is not None:
            del streams[output.id]
            if stream.stopped is not None:
                self.engine.abort(output.id, FinishReason.STOP, stream.num_tokens)
        return piece

    def _abort(self, streams: Mapping[str, TextStream]) -> None:
        for request_id in streams:
            self.engine.abort(request_id)


def _options(template: Mapping[str, Any]) -> dict[str, Any]:
    """Split what the chat template is told into tools and its other options."""
    options = dict(template)
    return {"tools": options.pop("tools", None), "options": options}


def _config(model: str, settings: Mapping[str, Any]) -> EngineConfig:
    """Return the configuration of settings, of which nested ones may be dicts."""
    plain = {"model": model, **settings}
    defaults = EngineConfig()
    for name in ("scheduler", "cache", "adapters"):
        if isinstance(plain.get(name), dict):
            plain[name] = from_dict(type(getattr(defaults, name)), plain[name])
    return from_dict(EngineConfig, plain)
