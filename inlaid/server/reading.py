"""Answers of conversations, read for reasoning and tool calls: piece by piece, or whole. The routes for chat, responses
and messages give what is read here in their own shapes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from inlaid.engine.request import FinishReason
from inlaid.server import answers
from inlaid.server.prepare import ClientRequest
from inlaid.server.service import Service
from inlaid.text.stream import Piece
from inlaid.text.tools.answer import AnswerForm
from inlaid.text.tools.events import Arguments, Call, Event, Reasoning, Text
from inlaid.text.tools.forms import CALL_FORMS

TOOL_CALLS = "tool_calls"


@dataclass
class ReadCall:
    """A tool call with the id that it got here."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class ReadAnswer:
    """One answer as far as it has been read."""

    text: str = ""  # for the reader
    reasoning: str = ""
    calls: list[ReadCall] = field(default_factory=list)


class Reader:
    """Reads one answer."""

    def __init__(self, form: AnswerForm) -> None:
        self.answer = ReadAnswer()
        self._form = form.calls or CALL_FORMS["json"]
        self._parser = form.parser()

    def read(self, text: str, last: bool) -> list[Event]:
        """Return the events that the next text of the answer makes certain, and keep what they say."""
        events = self._parser.feed(text) + (self._parser.finish() if last else [])
        for event in events:
            match event:
                case Text():
                    self.answer.text += event.text
                case Reasoning():
                    self.answer.reasoning += event.text
                case Call():
                    self.answer.calls.append(ReadCall(self._form.call_id(), event.name))
                case Arguments():
                    self.answer.calls[event.index].arguments += event.text
        return events

    def reason(self, reason: FinishReason | None) -> str | None:
        """Return why the answer ended: for its calls, where it has any and is whole."""
        if reason is FinishReason.STOP and self.answer.calls:
            return TOOL_CALLS
        return None if reason is None else reason.value


async def read_pieces(
    service: Service, client: ClientRequest, readers: Sequence[Reader]
) -> AsyncGenerator[tuple[int, Piece, list[Event]], None]:
    """Yield the pieces of all answers as they come, each with its answer's index and what was read in it."""
    async with aclosing(answers.all_pieces(service, client)) as arriving:
        async for index, piece in arriving:
            yield index, piece, readers[index].read(piece.text, piece.finish_reason is not None)


def read_whole(form: AnswerForm, text: str) -> Reader:
    """Return the reader of a complete answer."""
    reader = Reader(form)
    reader.read(text, last=True)
    return reader
