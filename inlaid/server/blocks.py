"""An answer as a row of blocks, each begun, continued and ended: responses' items, and the content of messages."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from inlaid.server import answers
from inlaid.server.prepare import ClientRequest
from inlaid.server.reading import Reader
from inlaid.server.service import Service
from inlaid.text.stream import Piece
from inlaid.text.tools.events import Arguments, Call, Event, Reasoning

Kind = Literal["reasoning", "text", "call"]
What = Literal["begin", "more", "end"]


@dataclass
class Block:
    """A part of an answer."""

    kind: Kind
    index: int
    id: str
    name: str = ""  # of the tool
    text: str = ""  # of a call: its arguments


Change = tuple[What, Block, str]


class Blocks:
    """The blocks of one answer. Blanks before a call are no block."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None
        self._blank = ""

    def add(self, events: Sequence[Event], reader: Reader) -> list[Change]:
        """Return what these events begin, continue and end."""
        changes: list[Change] = []
        for event in events:
            if isinstance(event, Call):
                made = reader.answer.calls[event.index]
                changes += self._begin("call", made.id, event.name)
            elif isinstance(event, Arguments):
                changes += self._more(event.text)
            else:
                changes += self._text("reasoning" if isinstance(event, Reasoning) else "text", event.text)
        return changes

    def finish(self) -> list[Change]:
        """End the last block; an answer without any has an empty text."""
        changes: list[Change] = []
        if not self.all:
            changes = [*self._begin("text", _name("text")), *self._more(self._blank)]
        return changes + self._end()

    def _text(self, kind: Kind, text: str) -> list[Change]:
        if self._open is not None and self._open.kind == kind:
            return self._more(text)
        self._blank += text
        if not self._blank.strip():
            return []
        text, self._blank = self._blank, ""
        return [*self._begin(kind, _name(kind)), *self._more(text)]

    def _begin(self, kind: Kind, name: str, tool: str = "") -> list[Change]:
        changes = self._end()
        self._blank = ""
        self._open = Block(kind, len(self.all), name, tool)
        self.all.append(self._open)
        return [*changes, ("begin", self._open, "")]

    def _more(self, text: str) -> list[Change]:
        assert self._open is not None
        self._open.text += text
        return [("more", self._open, text)] if text else []

    def _end(self) -> list[Change]:
        ended, self._open = self._open, None
        return [] if ended is None else [("end", ended, "")]


def _name(kind: Kind) -> str:
    return f"{'rs' if kind == 'reasoning' else 'msg'}_{secrets.token_hex(16)}"


async def read_blocks(
    service: Service, client: ClientRequest, blocks: Blocks, reader: Reader
) -> AsyncGenerator[tuple[Piece, list[Change]], None]:
    """Yield the pieces of a request's only answer as they come, each with what it changes."""
    async with aclosing(answers.pieces(service, client, 0)) as arriving:
        async for piece in arriving:
            last = piece.finish_reason is not None
            changes = blocks.add(reader.read(piece.text, last), reader)
            yield piece, changes + (blocks.finish() if last else [])
