"""Tool calls written in words, a line each: `call set lamp: level = 5, room = hall`.

The form of models whose vocabulary knows no JSON, as the demo's: names have blanks for underscores, texts no quotes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from inlaid.text.tools.events import Arguments, Call, Event, Text, joined
from inlaid.text.tools.word_schema import WordSchema, guessed_arguments

_OPENING = "call "


class WordCalls:
    """Reads one answer: a line is a call if it begins as one of a known tool; its arguments are certain at its end."""

    def __init__(self, names: Collection[str]) -> None:
        schemas = names if isinstance(names, Mapping) else {}
        self._schemas = {name: made for name in schemas if (made := WordSchema.of(schemas[name])) is not None}
        self._openings = {f"{_OPENING}{name.replace('_', ' ')}:": name for name in names}
        self._pending = ""
        self._count = 0
        self._calling: str | None = None  # the tool
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
        return joined(self._end_call(self._calling, rest) if self._calling is not None else [Text(rest)])

    def _next(self) -> list[Event]:
        """Return the next events, none if they need more text."""
        line, newline, rest = self._pending.partition("\n")
        if self._calling is not None:
            if not newline:
                return []
            self._pending = rest
            return self._end_call(self._calling, line)
        if not self._inside and (opening := next(filter(line.startswith, self._openings), None)) is not None:
            self._pending = self._pending[len(opening) :]
            self._calling = self._openings[opening]
            return [Call(self._count, self._calling)]
        if not self._inside and not newline and any(opening.startswith(line) for opening in self._openings):
            return []
        given, self._pending = line + newline, rest
        self._inside = not newline
        return [Text(given)] if given else []

    def _end_call(self, name: str, line: str) -> list[Event]:
        index, self._count, self._calling = self._count, self._count + 1, None
        schema = self._schemas.get(name)
        made = guessed_arguments(line.strip()) if schema is None else schema.arguments(line.strip())
        return [Arguments(index, json.dumps(made, ensure_ascii=False))]
