"""Prompts with an exact number of tokens. Called by `perf.workload`.

A tokenizer comes from a file or from the server's own `/tokenize`; without either, prompts can only be
`words`, whose length in tokens is the server's affair.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

PromptFormat = Literal["ids", "text", "words"]
Prompt = str | list[int]

BLOCK_TOKENS = 512  # what one hash id stands for in a Mooncake trace
WORDS = (
    "time year day way man thing life child world school state family group country hand part place case week "
    "work night point home water room mother area money story fact month book eye job word side kind head house "
    "name team line end game back line door air power law idea body face level road car city"
).split()


class Tokens(Protocol):
    """What a prompt maker needs of a tokenizer."""

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


class ServerTokenizer:
    """The server's `/tokenize`, as vLLM and inlaid have it."""

    def __init__(self, base_url: str, model: str, timeout_s: float = 30.0) -> None:
        self.url, self.model, self.timeout_s = base_url.rstrip("/") + "/tokenize", model, timeout_s

    def encode(self, text: str, special: bool) -> list[int]:
        body = {"model": self.model, "prompt": text, "add_special_tokens": special}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return [int(token) for token in json.load(response)["tokens"]]
        except (urllib.error.URLError, KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self.url} does not tokenize ({error}); name a tokenizer with --tokenizer, "
                "or use --prompt-format words (length then approximate)"
            ) from error


class PromptMaker:
    """Makes prompts of exactly n tokens; the same seed and index give the same prompt.

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
        """A prompt whose blocks equal those of any other prompt with the same hash ids."""
        if self.form != "ids":
            raise ValueError("a trace with shared blocks needs prompt format ids")
        ids: list[int] = []
        for block in blocks:
            rng = np.random.default_rng([self.seed, 1 << 32, block])
            ids += [self.ids[i] for i in rng.integers(0, len(self.ids), BLOCK_TOKENS)]
        missing = max(0, length - len(ids))
        return (ids + self.ids[:1] * missing)[:length]

    def count(self, text: str) -> int | None:
        """Tokens in a given text, or None where there is no tokenizer to ask."""
        return None if self.tokens is None else len(self._encode(text, self.special))

    def _encode(self, text: str, special: bool) -> list[int]:
        assert self.tokens is not None
        return self.tokens.encode(text, special)

    def _single_token_words(self) -> tuple[list[str], list[str]]:
        """Words that cost one token each after a space, and those that do at the start of a text."""
        candidates = [*WORDS, *"abcdefghijklmnopqrstuvwxyz"]
        base = len(self._encode("a a", False))
        inner = [word for word in candidates if len(self._encode(f"a a {word}", False)) == base + 1]
        first = [word for word in candidates if len(self._encode(word, False)) == 1]
        if not (inner and first):
            raise ValueError("this tokenizer has no word of one token: use prompt format ids")
        return inner, first

    def _exact_text(self, rng: np.random.Generator, length: int) -> str:
        picks = [self.openings[rng.integers(0, len(self.openings))]]
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
