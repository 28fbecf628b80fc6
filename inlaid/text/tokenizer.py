"""Between text and tokens: the tokenizer with its chat template, and the text of an answer as its tokens come. The
server and LLM use both; the engine itself knows tokens only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from inlaid.engine.request import FinishReason, Output, SamplingParams, TokenLogprobs

_BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character (yet)
_CONTEXT = 6  # prompt tokens that the first answer token is decoded after, so that spaces come out right
_MAX_HELD = 32  # tokens held back in the hope that they end with a whole character
_CHARACTER_BYTES = 4  # at most


class TemplateError(ValueError):
    """The chat template refuses these messages, or there is none."""


class Tokenizer:
    """A model's tokenizer. Its methods only read, and may run in threads."""

    def __init__(self, folder: str | Path, chat_template: str | None = None) -> None:
        self._model: Any = _read(Path(folder))
        self._fast: Any = self._model.backend_tokenizer
        self._fast.no_padding()
        self._fast.no_truncation()
        if chat_template is not None:
            self._model.chat_template = chat_template
        self.vocab_size: int = self._fast.get_vocab_size(with_added_tokens=True)
        self.max_token_bytes = max((len(token.encode()) for token in self._fast.get_vocab()), default=1)
        self._anchor = (self.encode("a", False) or [0])[-1]
        self._anchor_text = self.decode([self._anchor], False)
        self._texts: dict[int, str] = {}

    @property
    def has_template(self) -> bool:
        return self._model.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._fast.decode(ids, skip_special_tokens=skip_special_tokens)

    def render(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None, **options: Any) -> str:
        """The prompt that the model's chat template makes of messages."""
        import jinja2

        if not self.has_template:
            raise TemplateError("the model has no chat template; give one with --chat-template, or use completions")
        try:
            text = self._model.apply_chat_template(
                list(messages), tools=tools or None, tokenize=False, **{"add_generation_prompt": True, **options}
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise TemplateError(f"the chat template refuses these messages: {error}") from error
        return str(text)

    def token_text(self, token: int) -> str:
        """One token's own text, spaces and specials included."""
        if token not in self._texts:
            whole = self.decode([self._anchor, token], False)
            alone = whole.startswith(self._anchor_text)
            self._texts[token] = whole[len(self._anchor_text) :] if alone else self.decode([token], False)
        return self._texts[token]

    def token_bytes(self, token: int) -> bytes:
        """One token's bytes, which need not be whole characters."""
        text = self.token_text(token)
        if _BROKEN not in text:
            return text.encode()
        piece = self._fast.id_to_token(token) or ""
        if piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:-1], 16)])
        return bytes(_BYTE_OF[char] for char in piece if char in _BYTE_OF) or text.encode()


def _read(folder: Path) -> Any:
    """The tokenizer as transformers reads it. Where the folder says that its tokenizer.json is all there is to know,
    the generic class does, and spares the server importing torch."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # its warnings are about training and generating with transformers
    try:
        kind = json.loads((folder / "tokenizer_config.json").read_bytes()).get("tokenizer_class")
    except OSError:
        kind = None
    if kind in ("PreTrainedTokenizerFast", "TokenizersBackend") and (folder / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes: printable ones as they are, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Piece(msgspec.Struct, frozen=True):
    """What an Output means to a reader: the text that is now certain, and how it ended if it did."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token that ended it
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached: int = 0
    queue_time: float | None = None


class TextStream:
    """The text of one answer. It never shows half a character, nor the beginning of what may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._ids = list(prompt[-_CONTEXT:])  # shown ones, for context, then those still held back
        self._num_shown = len(self._ids)
        self._prefix = self._decode(self._ids).rstrip(_BROKEN)
        self._pending = ""  # text that may be the beginning of a stop string
        self.num_tokens = 0
        self.stopped: str | None = None  # the stop string that was found: nothing more will be shown

    def take(self, output: Output) -> Piece:
        """The next piece. When `finish_reason` is set the answer is over, even if the engine has not ended it yet."""
        reason = output.finish_reason
        hidden = output.stop_token is not None and not self._params.include_stop_str_in_output
        visible = output.tokens[:-1] if hidden else output.tokens
        text = self._advance(visible, len(output.tokens), last=reason is not None)
        stop: str | int | None = output.stop_token if output.stop_token in self._params.stop_token_ids else None
        if self.stopped is not None:
            reason, stop = FinishReason.STOP, self.stopped
        return Piece(
            text,
            output.tokens,
            output.logprobs,
            reason,
            stop,
            output.prompt_logprobs,
            output.num_cached,
            output.queue_time,
        )

    def _advance(self, visible: Sequence[int], num_tokens: int, last: bool) -> str:
        self.num_tokens += num_tokens
        self._pending += self._decode_new(visible, last)
        if not self._params.stop or self.num_tokens <= self._params.min_tokens:
            text, self._pending = self._pending, ""
            return text
        return self._cut(last)

    def _cut(self, last: bool) -> str:
        """Pending text up to a stop string, or up to what could still become one."""
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
        """Text of the tokens held back and these, when they end with a whole character."""
        self._ids += tokens
        if len(self._ids) == self._num_shown:
            return ""
        text = self._decode(self._ids)
        num_held = len(self._ids) - self._num_shown
        whole = last or not text.endswith(_BROKEN)
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
    """Length of the longest end of text that begins stop."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
