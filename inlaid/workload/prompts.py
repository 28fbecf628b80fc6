"""Prompts with an exact number of tokens.

A tokenizer comes from a file or from the server's own `/tokenize` (`perf.client`); without either, prompts can only be
`words`, whose length in tokens only the server knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

PromptFormat = Literal["ids", "text", "words"]
Prompt = str | list[int]

FIRST_TOKEN = 10  # random prompts leave out the first ids, which are special tokens in most vocabularies
BLOCK_TOKENS = 512  # tokens that one hash id of a Mooncake trace stands for
WORDS = tuple(
    (
        "time year day way man thing life child world school state family group country hand part place case week "
        "work night point home water room mother area money story fact month book eye job word side kind head house "
        "name team line end game back line door air power law idea body face level road car city"
    ).split()
)


class Tokens(Protocol):
    """The part of a tokenizer that a prompt maker uses."""

    def encode(self, text: str, special: bool) -> list[int]: ...


class TokenizerFile:
    """A `tokenizer.json`, or a folder that holds one."""

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer  # only needed when a file is named: keeps start-up quick

        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"tokenizer {path}: no tokenizer.json there")
        self.tokenizer = Tokenizer.from_file(str(file))

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special).ids)


class LengthsOnly:
    """Stand-in for prompts where only their lengths count: checks of a workload, and the simulator."""

    form: PromptFormat = "ids"

    def make(self, index: int, length: int) -> Prompt:
        return ""

    def from_blocks(self, blocks: tuple[int, ...], length: int) -> Prompt:
        return ""

    def count(self, text: str) -> int | None:
        return max(1, len(text.split()))


class RandomTokens(LengthsOnly):
    """Random tokens of a vocabulary, for an engine in this process that needs no tokenizer."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self.vocabulary, self.seed = vocabulary, seed

    def make(self, index: int, length: int) -> Prompt:
        drawn = np.random.default_rng([self.seed, index]).integers(FIRST_TOKEN, self.vocabulary, length)
        return [int(token) for token in drawn]


class PromptMaker:
    """Maker of prompts of exactly n tokens; the same seed and index give the same prompt.

    `ids` sends token ids and is exact on every server. `text` sends words and is exact for this tokenizer,
    counting the special tokens it adds (`special`). `words` sends n words and promises nothing.
    """

    def __init__(self, form: PromptFormat, tokens: Tokens | None, seed: int, special: bool = True) -> None:
        if tokens is None and form != "words":
            raise ValueError(f"prompt format {form} needs a tokenizer: name one with --tokenizer")
        self.form, self.tokens, self.seed, self.special = form, tokens, seed, special
        self.ids = sorted(set(self._encode(" ".join(WORDS), False))) if form == "ids" else []
        self.words, self.openings = self._single_token_words() if form == "text" else (WORDS, WORDS)
        self.extra = 0  # tokens beyond one a word, as last seen: a first guess for the next prompt

    def make(self, index: int, length: int) -> Prompt:
        rng = np.random.default_rng([self.seed, index])
        if self.form == "ids":
            return [self.ids[i] for i in rng.integers(0, len(self.ids), length)]
        if self.form == "words":
            return " ".join(self.words[i] for i in rng.integers(0, len(self.words), length))
        return self._exact_text(rng, length)

    def from_blocks(self, blocks: tuple[int, ...], length: int) -> Prompt:
        """Make a prompt whose blocks equal those of any other prompt with the same hash ids."""
        if self.form != "ids":
            raise ValueError("a trace with shared blocks needs prompt format ids")
        ids: list[int] = []
        for block in blocks:
            rng = np.random.default_rng([self.seed, 1 << 32, block])
            ids += [self.ids[i] for i in rng.integers(0, len(self.ids), BLOCK_TOKENS)]
        missing = max(0, length - len(ids))
        return (ids + self.ids[:1] * missing)[:length]

    def count(self, text: str) -> int | None:
        """Count tokens of a given text; None where there is no tokenizer to ask."""
        return None if self.tokens is None else len(self._encode(text, self.special))

    def _encode(self, text: str, special: bool) -> list[int]:
        assert self.tokens is not None
        return self.tokens.encode(text, special)

    def _single_token_words(self) -> tuple[Sequence[str], Sequence[str]]:
        """Find words that cost one token each after a space, and those that do at the start of a text."""
        candidates = [*WORDS, *"abcdefghijklmnopqrstuvwxyz"]
        base = len(self._encode("a a", False))
        inner = [word for word in candidates if len(self._encode(f"a a {word}", False)) == base + 1]
        first = [word for word in candidates if len(self._encode(word, False)) == 1]
        if not (inner and first):
            raise ValueError("this tokenizer has no word of one token: use prompt format ids")
        return inner, first

    def _exact_text(self, rng: np.random.Generator, length: int) -> str:
        picks = [self.openings[int(rng.integers(0, len(self.openings)))]]
        picks += [self.words[i] for i in rng.integers(0, len(self.words), length - 1)]
        size = max(1, length - self.extra)
        for _ in range(8):
            text = " ".join(picks[:size])
            found = len(self._encode(text, self.special))
            if found == length:
                self.extra = length - size
                return text
            size = min(len(picks), max(1, size + length - found))
        raise ValueError(f"this tokenizer makes no text of exactly {length} tokens: use prompt format ids")
