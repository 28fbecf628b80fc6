"""One tool call written as JSON, read while its characters come."""

from __future__ import annotations

import json
from collections.abc import Collection

from inlaid.text.nesting import MAX_DEPTH
from inlaid.text.tools.events import Arguments, Call, Event

_NAME = (("name",), ("function", "name"))
_ARGUMENTS = (("arguments",), ("parameters",), ("function", "arguments"), ("function", "parameters"))
_SCALAR = frozenset("+-.0123456789truefalsnE \t\r\n")
_CLOSES = {"{": "}", "[": "]"}.get


class _Level:
    """An open object or list, and the last key in it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.key: str | None = None
        self.expects_key = kind == "{"


class CallReader:
    """Reads {"name": …, "arguments": {…}}, alone or inside {"function": …}, with `parameters` for `arguments` too. With
    a name the object is the arguments themselves.

    `broken`: this is no call, or not of a known tool (`names`; None: any), and nothing of it has been told.
    """

    def __init__(self, index: int, names: Collection[str] | None = None, name: str | None = None) -> None:
        self.raw = ""  # all that was read
        self.done = self.broken = False
        self._index = index
        self._names = names
        self._bare = name is not None
        self._name = name
        self._told = False
        self._levels: list[_Level] = []
        self._at = 0  # the character that is read now
        self._in_string = self._escaped = False
        self._string_at = 0
        self._begin: int | None = None  # of the arguments, in `raw`
        self._end: int | None = None
        self._num_told = 0  # characters of the arguments
        self._text: str | None = None  # of arguments that are written as a string

    def read(self, text: str) -> tuple[int, list[Event]]:
        """Read up to the end of the call; return how many characters were read, and what is certain."""
        before = len(self.raw)
        self.raw += text
        for at in range(before, len(self.raw)):
            self._at = at
            self._advance(self.raw[at])
            if self.done or self.broken:
                self.raw = self.raw[: self._at + 1]
                break
        return len(self.raw) - before, self._events()

    def finish(self) -> list[Event]:
        """Return what is left of a call that was cut off; one without a name is broken."""
        self.broken = self.broken or not self._told
        return []

    def _advance(self, char: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                self._end_string()
        elif char == '"':
            self._in_string, self._string_at = True, self._at
        elif char in "{[":
            self._open(char)
        elif char in "}]":
            self._close(char)
        elif char in ":,":
            level = self._levels[-1]
            level.expects_key = char == "," and level.kind == "{"
        elif char not in _SCALAR:
            self._fail()

    def _path(self) -> tuple[str | None, ...]:
        return tuple(level.key for level in self._levels)

    def _open(self, char: str) -> None:
        if len(self._levels) == MAX_DEPTH:
            self._fail()
        elif char == "{" and self._begin is None and (self._bare or self._path() in _ARGUMENTS):
            self._begin = self._at
        self._levels.append(_Level(char))

    def _close(self, char: str) -> None:
        level = self._levels.pop()
        if _CLOSES(level.kind) != char:
            self._fail()
            return
        if self._begin is not None and self._end is None and (self._path() in _ARGUMENTS or not self._levels):
            self._end = self._at + 1
        self.done = not self._levels
        if self.done and self._name is None:
            self._fail()

    def _end_string(self) -> None:
        level = self._levels[-1]
        written = self.raw[self._string_at : self._at + 1]
        if level.expects_key:
            level.key = _decoded(written)
        elif self._path() in _NAME and not self._bare:
            self._name = _decoded(written)
            if self._names is not None and self._name not in self._names:
                self._fail()
        elif self._path() in _ARGUMENTS and self._begin is None:
            self._text = _decoded(written)

    def _fail(self) -> None:
        self.broken = not self._told
        self.done = self._told

    def _events(self) -> list[Event]:
        if self.broken or self._name is None:
            return []
        made: list[Event] = []
        if not self._told:
            made.append(Call(self._index, self._name))
            self._told = True
        if self._begin is not None:
            fresh = self.raw[self._begin + self._num_told : self._end]
        else:  # a call without arguments has an empty object
            fresh = (self._text or "{}") if self.done else ""
        if fresh:
            made.append(Arguments(self._index, fresh))
            self._num_told += len(fresh)
        return made


def _decoded(written: str) -> str:
    try:
        return str(json.loads(written, strict=False))
    except ValueError:
        return written[1:-1]
