"""The text of an answer as its tokens come. The server and LLM use it; the engine itself knows token ids only."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from inlaid.engine.request import FinishReason, Output, SamplingParams, TokenLogprobs
from inlaid.text.tokenizer import BROKEN, Tokenizer

_CONTEXT = 6  # prompt tokens that the first answer token is decoded after, so that spaces come out right
_MAX_HELD = 32  # tokens held back in the hope that they end with a whole character
_CHARACTER_BYTES = 4  # at most


class Piece(msgspec.Struct, frozen=True):
    """An Output with its text: what is certain by now, and how the answer ended if it did."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token that ended it
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached: int = 0
    queue_time: float | None = None
    adapter_time: float = 0.0
    adapter_read: float = 0.0
    adapter_copy: float = 0.0
    host_time: float = 0.0


class Answer(msgspec.Struct, kw_only=True):
    """One answer, gathered from its pieces."""

    parts: list[str] = []  # of the text
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached: int = 0

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.parts)

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.parts.append(piece.text)
        self.tokens += piece.tokens
        if piece.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += piece.logprobs
        self.prompt_logprobs = self.prompt_logprobs or piece.prompt_logprobs
        self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason
        self.num_cached = max(self.num_cached, piece.num_cached)


class TextStream:
    """The text of one answer. It never shows half a character, nor the beginning of what may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._ids = list(prompt[-_CONTEXT:])  # shown ones, for context, then those still held back
        self._num_shown = len(self._ids)
        self._prefix = self._decode(self._ids).rstrip(BROKEN)
        self._pending = ""  # text that may be the beginning of a stop string
        self.num_tokens = 0
        self.stopped: str | None = None  # the stop string that was found: nothing more will be shown

    def take(self, output: Output) -> Piece:
        """Return the next piece. With a `finish_reason` the answer is over, even if the engine has not ended it yet.
        Tokens after the one that completes a stop string are no part of the answer, however many come at once."""
        num_before = self.num_tokens
        reason, tokens, logprobs = output.finish_reason, output.tokens, output.logprobs
        hidden = output.stop_token is not None and not self._params.include_stop_str_in_output
        visible = tokens[:-1] if hidden else tokens
        if self._params.stop:
            text = self._advance_to_stop(visible, len(tokens), last=reason is not None)
        else:
            text = self._advance(visible, len(tokens), last=reason is not None)
        stop: str | int | None = output.stop_token if output.stop_token in self._params.stop_token_ids else None
        if self.stopped is not None:
            reason, stop = FinishReason.STOP, self.stopped
            num_left = self.num_tokens - num_before
            tokens, logprobs = tokens[:num_left], None if logprobs is None else logprobs[:num_left]
        return Piece(
            text,
            tokens,
            logprobs,
            reason,
            stop,
            output.prompt_logprobs,
            output.num_cached,
            output.queue_time,
            output.adapter_time,
            output.adapter_read,
            output.adapter_copy,
            output.host_time,
        )

    def _advance_to_stop(self, visible: Sequence[int], num_tokens: int, last: bool) -> str:
        """Advance token by token, so that the answer ends at the same token whatever pieces it comes in."""
        text = ""
        for place in range(num_tokens):
            text += self._advance(visible[place : place + 1], 1, last and place == num_tokens - 1)
            if self.stopped is not None:
                return text
        return text if num_tokens else self._advance((), 0, last)

    def _advance(self, visible: Sequence[int], num_tokens: int, last: bool) -> str:
        self.num_tokens += num_tokens
        self._pending += self._decode_new(visible, last)
        if not self._params.stop or self.num_tokens <= self._params.min_tokens:
            text, self._pending = self._pending, ""
            return text
        return self._cut(last)

    def _cut(self, last: bool) -> str:
        """Take the pending text up to a stop string, or up to what could still become one."""
        places = [(self._pending.find(stop), stop) for stop in self._params.stop]
        found = [(at + len(stop), -len(stop), stop) for at, stop in places if at >= 0]
        if found:  # the one that ends first, whatever pieces the text came in; of two, the longer
            end, _, self.stopped = min(found)
            if not self._params.include_stop_str_in_output:
                end -= len(self.stopped)
            return self._pending[:end]
        keep = 0 if last else max(_overlap(self._pending, stop) for stop in self._params.stop)
        cut = len(self._pending) - keep
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text

    def _decode_new(self, tokens: Sequence[int], last: bool) -> str:
        """Return the text of the tokens held back and of these, when they end with a whole character."""
        self._ids += tokens
        if len(self._ids) == self._num_shown:
            return ""
        text = self._decode(self._ids)
        num_held = len(self._ids) - self._num_shown
        whole = last or not text.endswith(BROKEN)
        if not whole and num_held < _MAX_HELD:
            return ""
        new = text[len(self._prefix) : None if whole else -1]
        if new or num_held >= _MAX_HELD:
            self._ids = self._ids[self._num_shown :] if whole else self._ids[-_CHARACTER_BYTES:]
            self._num_shown = len(self._ids)
            self._prefix = self._decode(self._ids)[: None if whole else -1]
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._params.skip_special_tokens)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of text that begins stop."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
