"""Tool calls written in words, a line each: `call set lamp: level = 5, room = hall`.

The form of models whose vocabulary knows no JSON, as the demo's: names have blanks for underscores, texts no quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from inlaid.text.tools.events import Arguments, Call, Event, Text, joined

_OPENING = "call "
_PAIRS = re.compile(r"(?:^|, )(\w[\w ]*) = ")
_SCALAR = re.compile(r"-?\d+(?:\.\d+)?|true|false|null")


class WordCalls:
    """Reads one answer: a line is a call if it begins as one of a known tool; its arguments are certain at its end."""

    def __init__(self, names: Collection[str]) -> None:
        self._openings = {f"{_OPENING}{name.replace('_', ' ')}:": name for name in names}
        self._pending = ""
        self._count = 0
        self._calling = False
        self._inside = False  # within a line of text

    def feed(self, text: str) -> list[Event]:
        """Return what is certain after this text."""
        self._pending += text
        made: list[Event] = []
        while events := self._next():
            made += events
        return joined(made)

    def finish(self) -> list[Event]:
        """Return what was held back."""
        rest, self._pending = self._pending, ""
        return joined(self._end_call(rest) if self._calling else [Text(rest)])

    def _next(self) -> list[Event]:
        """Return the next events, none if they need more text."""
        line, newline, rest = self._pending.partition("\n")
        if self._calling:
            if not newline:
                return []
            self._pending = rest
            return self._end_call(line)
        if not self._inside and (opening := next(filter(line.startswith, self._openings), None)) is not None:
            self._pending = self._pending[len(opening) :]
            self._calling = True
            return [Call(self._count, self._openings[opening])]
        if not self._inside and not newline and any(opening.startswith(line) for opening in self._openings):
            return []
        given, self._pending = line + newline, rest
        self._inside = not newline
        return [Text(given)] if given else []

    def _end_call(self, line: str) -> list[Event]:
        index, self._count, self._calling = self._count, self._count + 1, False
        return [Arguments(index, json.dumps(_arguments(line.strip()), ensure_ascii=False))]


def _arguments(line: str) -> dict[str, object]:
    """Return the values of `KEY = VALUE, …`; a value may have commas in it."""
    _, *parts = _PAIRS.split(line)
    return {key.replace(" ", "_"): _value(value) for key, value in zip(parts[::2], parts[1::2], strict=True)}


def _value(text: str) -> object:
    return json.loads(text) if _SCALAR.fullmatch(text) else text
