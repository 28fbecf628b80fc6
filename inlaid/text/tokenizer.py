"""A model's tokenizer: text to token ids and back, and the text and bytes of one token. The engine itself knows token
ids only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from inlaid.text.literal import SpecialTokens, StandIns
from inlaid.text.template import ChatTemplate
from inlaid.text.tokenizer_files import read_tokenizer

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


class TooManyTokens(ValueError):
    """A text has more tokens than its caller takes; the argument is their number."""


class Tokenizer:
    """A model's tokenizer and chat template. Its methods only read, and may run in threads."""

    def __init__(self, folder: str | Path, chat_template: str | None = None) -> None:
        try:
            files = read_tokenizer(Path(folder))
        except Exception as error:  # its readers raise anything where a file is not what they expect
            raise ValueError(f"the tokenizer of {folder} cannot be read: {type(error).__name__}: {error}") from error
        self._fast: Any = files.fast
        self._fast.no_padding()
        self._fast.no_truncation()
        self.template = ChatTemplate(
            files.chat_template if chat_template is None else chat_template, files.special_tokens
        )
        self.vocab_size: int = self._fast.get_vocab_size(with_added_tokens=True)
        self.max_token_bytes = max((len(token.encode()) for token in self._fast.get_vocab()), default=1)
        self._anchor = (self.encode("a", False) or [0])[-1]
        self._anchor_text = self.decode([self._anchor], False)
        self._texts: dict[int, str] = {}
        added = self._fast.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self.special_tokens = SpecialTokens(self._special)
        self._plain: Any = None  # a copy that knows no special tokens, made when one is first needed

    def encode(self, text: str, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        """Return the token ids of a text. Other threads go on meanwhile, however long it is: without the offsets of
        tokens nothing long is done under the interpreter's lock. TooManyTokens: it has more than `most`."""
        [encoding] = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        if most is not None and (count := len(encoding)) > most:
            del encoding  # the error's traceback would keep it
            raise TooManyTokens(count)
        ids: list[int] = encoding.ids
        return ids

    def encode_literally(self, text: str, stand_ins: StandIns, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text in which characters stand for special tokens that are meant as text."""
        if not stand_ins:
            return self.encode(text, add_special_tokens)
        if self._plain is None:
            plain = copy.deepcopy(self._fast)
            plain.encode_special_tokens = True
            self._plain = plain
        ids: list[int] = []
        for stretch, is_plain in self.special_tokens.stretches(text, stand_ins):
            ids += (
                self._plain.encode(stretch, add_special_tokens=False).ids if is_plain else self.encode(stretch, False)
            )
        if not add_special_tokens:
            return ids
        alone, whole = self.encode("a", False), self.encode("a")
        before = next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
        return whole[:before] + ids + whole[before + len(alone) :]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        text: str = self._fast.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def is_special(self, text: str) -> bool:
        """Tell whether a text is one special token, which decoding leaves out."""
        return text in self._special

    def token_text(self, token: int) -> str:
        """Return one token's own text, spaces and special tokens included."""
        if token not in self._texts:
            whole = self.decode([self._anchor, token], False)
            alone = whole.startswith(self._anchor_text)
            self._texts[token] = whole[len(self._anchor_text) :] if alone else self.decode([token], False)
        return self._texts[token]

    def token_bytes(self, token: int) -> bytes:
        """Return one token's bytes, which need not be whole characters."""
        text = self.token_text(token)
        if BROKEN not in text:
            return text.encode()
        piece = self._fast.id_to_token(token) or ""
        if piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:-1], 16)])
        return bytes(_BYTE_OF[char] for char in piece if char in _BYTE_OF) or text.encode()


def _byte_alphabet() -> Mapping[str, int]:
    """Return the characters that byte-level BPE writes for bytes: visible ones as they are, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return MappingProxyType(alphabet)


_BYTE_OF = _byte_alphabet()
