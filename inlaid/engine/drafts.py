"""Drafts without a model: tokens that may come next, copied from behind an earlier place where the same tokens stood.

`OwnText` looks in the request's own prompt and answer. `Phrases` looks in finished answers, and `PhraseBook` keeps one
`Phrases` for each adapter (by its content identity, so that a swapped adapter starts anew) and, by the scope, for each
tenant. Nothing here is ever written to disk. A draft is only a guess: a step checks each of its tokens.

A match that is found is followed: while the answer goes on as the text at that place does, nothing is searched.
Finished answers are strings of one character per token, since Python searches, cuts and hashes these quickest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from inlaid.engine.request import Request

SCOPES = ("request", "tenant", "adapter")
LEAST_MATCH = 2  # tokens of a request's own text that must stand before both places
LENGTHS = (1, 2, 3, 6)  # of the matches that phrases are found by
LONGEST_MATCH = 16  # a longer one says no more
LONG_MATCH = 4  # of a request's own text; only a shorter one is compared with other places
MOST_OWN = 4096  # newest tokens of its own text that a request is searched for at first
MOST_PLACES = 8  # that a match in a request's own text is looked for, the latest first
BYTES_PER_TOKEN = 450  # of phrases: the token, and an entry of the index for each length of match
END = chr(0x10FFFF)  # behind each phrase; no vocabulary has such a token
TOKEN_BITS = 21  # tokens are below 0x110000, as they are characters

Key = tuple[str | None, str, str]  # adapter identity, tenant and salt, as far as the scope goes


def as_text(tokens: Sequence[int]) -> str:
    """Return tokens as the text that is searched."""
    return "".join(map(chr, tokens))


class OwnText:
    """A request's own text: for each pair of tokens the place behind the latest one, and from there back."""

    __slots__ = ("_before", "_first", "_latest", "_length", "_place", "_request", "_seen")

    def __init__(self, request: Request) -> None:
        self._request = request
        self._first = self._seen = max(0, len(request.tokens) - MOST_OWN)
        self._latest: dict[int, int] = {}  # by pair: the place behind the latest one
        self._before: list[int] = []  # by token: the place behind the pair before that is the same, or -1
        self._place = self._length = -1  # the match that is followed: what came next there; tokens that agree

    def find(self, most: int) -> tuple[list[int], int]:
        """Return up to `most` tokens that followed an earlier place with the same last tokens, and how many those are;
        no tokens if there is no such place."""
        tokens, seen = self._request.tokens, self._seen
        size = len(tokens)
        if size > seen:
            place = self._place
            if place >= 0:
                goes_on = tokens[place] == tokens[seen] and tokens[place : place + size - seen] == tokens[seen:]
                self._place, self._length = (place + size - seen, self._length + size - seen) if goes_on else (-1, -1)
            self._index(tokens)
        if self._length < LONG_MATCH and self._before and self._before[-1] >= 0:
            self._search(tokens)
        place = self._place
        return ([], 0) if place < 0 else (tokens[place : place + most], min(self._length, LONGEST_MATCH))

    def _index(self, tokens: Sequence[int]) -> None:
        """Take in the tokens that are new."""
        latest, add, seen, first = self._latest, self._before.append, self._seen, self._first
        last = tokens[seen - 1] if seen > first else -1  # there is no such token
        at = seen
        for token in tokens[seen:] if seen else tokens:
            pair = last << TOKEN_BITS | token
            at += 1
            add(latest.get(pair, -1))
            latest[pair] = at
            last = token
        self._seen = at

    def _search(self, tokens: Sequence[int]) -> None:
        """Look for a longer match among the latest places with the same last two tokens."""
        size, first, before = len(tokens), self._first, self._before
        place = before[-1]
        for _ in range(MOST_PLACES):
            if place < 0:
                return
            length = LEAST_MATCH
            while (
                length < LONGEST_MATCH
                and place - length > first
                and tokens[place - 1 - length] == tokens[size - 1 - length]
            ):
                length += 1
            if length > self._length:
                self._place, self._length = place, length
            place = before[place - 1 - first]


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

    def holds(self, half: _Half) -> bool:
        """Return True if these answers have not been dropped."""
        return half is self._young or half is self._old

    def search(self, tail: str) -> tuple[_Half, int, int] | None:
        """Return the answers and the place behind the latest match with the end of `tail`, and the tokens that are
        known to agree. Where a short run does not stand, no longer one does."""
        best: tuple[_Half, int, int] | None = None
        most = 0
        for half in (self._young, self._old):
            index = half.index
            if not index or most == LENGTHS[-1]:
                continue
            for length in LENGTHS:
                place = index.get(tail[-length:], -1)
                if place < 0 or length > len(tail):
                    break
                if length > most:
                    best, most = (half, place, length), length
        return best


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


class Reader:
    """A request's place in the answers that it may see."""

    __slots__ = ("_half", "_key", "_length", "_place", "_request", "_seen")

    def __init__(self, request: Request, key: Key) -> None:
        self._request, self._key = request, key
        self._half: _Half | None = None
        self._place = self._length = self._seen = 0

    def find(self, book: PhraseBook, most: int) -> tuple[str, int]:
        """Return up to `most` tokens that followed a place with the same last tokens, and how many of the tokens before
        are known to agree; no tokens where the answer ended."""
        phrases = book.of(self._key)
        if phrases is None:
            return "", 0
        tokens = self._request.tokens
        half = self._half
        if half is not None and not (phrases.holds(half) and self._follows(half, tokens)):
            half = None
        self._seen = len(tokens)
        if half is None or self._length < LENGTHS[-1]:
            found = phrases.search(as_text(tokens[-LENGTHS[-1] :]))
            if found is not None and (half is None or found[2] > self._length):
                half, self._place, self._length = found
        self._half = half
        if half is None:
            return "", 0
        return half.text[self._place : self._place + most].partition(END)[0], min(self._length, LONGEST_MATCH)

    def _follows(self, half: _Half, tokens: Sequence[int]) -> bool:
        """Move on behind the tokens that are new, if they are those that stand here."""
        new = tokens[self._seen :]
        place, count = self._place, len(new)
        if not half.text.startswith(chr(new[0]) if count == 1 else as_text(new), place):
            return False
        self._place, self._length = place + count, self._length + count
        return True


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

    def of(self, key: Key) -> Phrases | None:
        """Return the answers that requests of a key see."""
        return self._phrases.get(key)

    def reader(self, request: Request) -> Reader:
        """Return a reader of the answers that the scope lets this request see."""
        return Reader(request, self._key(request))

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
