"""The parts of an answer that a parser tells apart, in the order in which they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec


class Text(msgspec.Struct, frozen=True):
    """Text for the reader."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """Text of the model's thinking."""

    text: str


class Call(msgspec.Struct, frozen=True):
    """The beginning of a tool call; calls are numbered from 0."""

    index: int
    name: str


class Arguments(msgspec.Struct, frozen=True):
    """The next characters of a call's arguments, which are JSON."""

    index: int
    text: str


Event = Text | Reasoning | Call | Arguments


class Parser(Protocol):
    """The reader of one answer. It holds back text that may still become a marker."""

    def feed(self, text: str) -> list[Event]:
        """Return what is certain after this text."""
        ...

    def finish(self) -> list[Event]:
        """Return what was held back: the answer has ended."""
        ...


def overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of the text that begins the marker."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


def joined(events: Sequence[Event]) -> list[Event]:
    """Join neighbours of one kind, and leave out empty ones."""
    made: list[Event] = []
    for event in events:
        last = made[-1] if made else None
        if isinstance(event, (Text, Reasoning)) and type(last) is type(event):
            assert isinstance(last, (Text, Reasoning))
            made[-1] = type(event)(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments) and last.index == event.index:
            made[-1] = Arguments(event.index, last.text + event.text)
        elif isinstance(event, Call) or event.text:
            made.append(event)
    return made
