"""Drafts without a model: tokens that may come next, copied from behind an earlier place where the same tokens stood.

`Prompted` looks in the request's own prompt and answer. `Phrases` looks in finished answers, and `PhraseBook` keeps one
`Phrases` for each adapter (by its content identity, so that a swapped adapter starts anew) and, by the scope, for each
tenant. Nothing here is ever written to disk. A draft is only a guess: a step checks each of its tokens.

Texts are strings of one character per token, since Python searches, cuts and hashes these quickest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from inlaid.engine.request import Request

SCOPES = ("request", "tenant", "adapter")
LEAST_MATCH = 2  # tokens of a request's own text that must stand before both places
LENGTHS = (6, 3, 2, 1)  # of the matches that phrases are found by, the longest first
LONGEST_MATCH = 16  # of a request's own text; a longer one says no more
MOST_OWN = 4096  # newest tokens of its own text that a request is searched for
BYTES_PER_TOKEN = 450  # of phrases: the token, and an entry of the index for each length of match
END = chr(0x10FFFF)  # behind each phrase; no vocabulary has such a token

Key = tuple[str | None, str, str]  # adapter identity, tenant and salt, as far as the scope goes


def as_text(tokens: Sequence[int]) -> str:
    """Return tokens as the text that is searched."""
    return "".join(map(chr, tokens))


class Prompted:
    """A request's own text, brought up to its newest token at each look."""

    __slots__ = ("_first", "_request", "_text")

    def __init__(self, request: Request) -> None:
        self._request = request
        self._first = max(0, len(request.tokens) - MOST_OWN)
        self._text = as_text(request.tokens[self._first :])

    def text(self) -> str:
        """Return the text so far."""
        known, tokens = self._first + len(self._text), self._request.tokens
        if known < len(tokens):
            self._text += chr(tokens[known]) if known + 1 == len(tokens) else as_text(tokens[known:])
        return self._text

    def find(self, most: int) -> tuple[str, int]:
        """Return up to `most` tokens that followed the latest earlier place with the same last tokens, and how many
        those are; no tokens if there is no such place."""
        text = self.text()
        size = len(text)
        place = text.rfind(text[-LEAST_MATCH:], 0, size - 1) if size > LEAST_MATCH else -1
        if place < 0:
            return "", 0
        length = LEAST_MATCH
        while length < LONGEST_MATCH:  # a longer match may stand further back
            further = text.rfind(text[-2 * length :], 0, size - 1) if size > 2 * length else -1
            if further < 0:
                break
            place, length = further, 2 * length
        begin = place + length
        return text[begin : begin + most], length


class Phrases:
    """Finished answers, at most `room` tokens: when half of that is full, it is the older half and a new one begins."""

    def __init__(self) -> None:
        self._young, self._old = _Half(), _Half()

    @property
    def num_tokens(self) -> int:
        return len(self._young.text) + len(self._old.text)

    def add(self, answer: str, room: int) -> None:
        """Keep an answer; the answers of the older half are dropped when there is no room for it."""
        answer = answer[-(room // 2 - 1) :] + END
        if len(self._young.text) + len(answer) > room // 2:
            self._old, self._young = self._young, _Half()
        self._young.add(answer)

    def find(self, tail: str, most: int) -> tuple[str, int]:
        """Return up to `most` tokens that followed the latest place with the same last tokens as `tail`, and how many
        of the tokens before are known to agree."""
        for length in LENGTHS:
            wanted = tail[-length:]
            if len(wanted) == length:
                for half in (self._young, self._old):
                    place = half.index.get(wanted, -1)
                    if place >= 0:
                        return half.text[place : place + most].partition(END)[0], length
        return "", 0


class _Half:
    """Answers, and for each run of tokens the place behind the latest one."""

    __slots__ = ("index", "text")

    def __init__(self) -> None:
        self.text = ""
        self.index: dict[str, int] = {}

    def add(self, answer: str) -> None:
        begin, size = len(self.text), len(answer)
        self.text += answer
        for length in LENGTHS:
            runs = map(answer.__getitem__, map(slice, range(size - length), range(length, size)))
            self.index.update(zip(runs, range(begin + length, begin + size)))


class PhraseBook:
    """The phrases of every adapter within a bound of memory; those not used for longest are dropped first."""

    def __init__(self, scope: str, max_bytes: int) -> None:
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r} of drafts; known: {', '.join(SCOPES)}")
        self.scope = scope
        self._max_tokens = max_bytes // BYTES_PER_TOKEN
        self._phrases: OrderedDict[Key, Phrases] = OrderedDict()
        self._num_tokens = 0

    @property
    def num_bytes(self) -> int:
        """Return the memory in use, as it is counted."""
        return self._num_tokens * BYTES_PER_TOKEN

    def find(self, request: Request, tail: str, most: int) -> tuple[str, int]:
        """Return a draft from answers that the scope lets this request see, and the length of its match."""
        phrases = self._phrases.get(self._key(request))
        return ("", 0) if phrases is None else phrases.find(tail, most)

    def learn(self, request: Request, answer: str) -> None:
        """Keep the answer of a request that has ended."""
        if self.scope == "request" or len(answer) < LEAST_MATCH or self._max_tokens < 64:
            return
        key = self._key(request)
        phrases = self._phrases.setdefault(key, Phrases())
        self._phrases.move_to_end(key)
        before = phrases.num_tokens
        phrases.add(answer, self._max_tokens // 2)
        self._num_tokens += phrases.num_tokens - before
        while self._num_tokens > self._max_tokens:
            _, dropped = self._phrases.popitem(last=False)
            self._num_tokens -= dropped.num_tokens

    def _key(self, request: Request) -> Key:
        """Return what a request must share with another to see its answers."""
        tenant = "" if self.scope == "adapter" else request.account.tenant
        return request.adapter, tenant, request.cache_salt
