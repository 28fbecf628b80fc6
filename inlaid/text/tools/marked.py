"""Tool calls as JSON behind a mark, in an answer that may have text before them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from inlaid.text.tools.calls import CallReader
from inlaid.text.tools.events import Event, Text, joined, overlap

_BETWEEN = " \t\r\n,;"  # calls in a list or in a row
_MAX_NAME = 256


@dataclass(frozen=True)
class Marks:
    """The marks of one form."""

    opening: tuple[str, ...]
    kept: int = 0  # characters at the end of an opening that belong to the call itself
    start: str = ""  # opens a call too, at the very beginning of an answer, and belongs to it
    end: str = ""  # after it comes text again
    named: bool = False  # a call may be a name, what is in brackets, and the arguments
    known: bool = False  # only a known tool's name makes it a call: the mark alone could be text


class MarkedCalls:
    """Reads one answer."""

    def __init__(self, marks: Marks, names: Collection[str]) -> None:
        self._marks = marks
        self._names = names if marks.known else None
        self._pending = ""
        self._held = ""  # from the mark on, to be given as text if no call follows
        self._count = 0
        self._blank = False
        self._call: CallReader | None = None
        self._state = "beginning" if marks.start else "text"
        self._made: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        """Return what is certain after this text."""
        self._pending += text
        while getattr(self, f"_{self._state}")():
            pass
        return self._take()

    def finish(self) -> list[Event]:
        """Return what was held back."""
        if self._call is not None:
            self._made += self._call.finish()
            if self._call.broken:
                self._give_up()
        else:
            self._pending = self._held + self._pending
            self._give(len(self._pending))
        return self._take()

    def _take(self) -> list[Event]:
        made, self._made = joined(self._made), []
        return made

    def _beginning(self) -> bool:
        """Wait for the first character that is no blank."""
        text = self._pending.lstrip()
        if not text:
            return False
        if text.startswith(self._marks.start):
            self._held, self._pending = "", text
            self._state = "between"
        else:
            self._state = "text"
        return True

    def _text(self) -> bool:
        """Give text up to a mark, or up to what may become one."""
        found = [(at, mark) for mark in self._marks.opening if (at := self._pending.find(mark)) >= 0]
        if not found:
            keep = max(overlap(self._pending, mark) for mark in self._marks.opening)
            self._give(len(self._pending) - keep)
            return False
        at, mark = min(found)
        self._give(at)
        cut = len(mark) - self._marks.kept
        self._held, self._pending = self._pending[:cut], self._pending[cut:]
        self._state = "between"
        return True

    def _give(self, count: int) -> None:
        text, self._pending = self._pending[:count], self._pending[count:]
        if self._blank:  # nothing but blanks since the last call
            text = text.lstrip()
        self._blank = self._blank and not text
        self._made.append(Text(text))

    def _between(self) -> bool:
        """Find the next call, or the end of the calls."""
        rest = self._pending.lstrip(_BETWEEN)
        self._skip(len(self._pending) - len(rest))
        marks = [mark for mark in (self._marks.end, *self._marks.opening) if mark]
        if not rest or any(mark != rest and mark.startswith(rest) for mark in marks):
            return False  # it may become a mark
        if rest.startswith("{"):
            self._call = CallReader(self._count, self._names)
            self._state = "calling"
        elif self._marks.end and rest.startswith(self._marks.end):
            self._pending, self._held, self._state = rest[len(self._marks.end) :], "", "text"
        elif any(rest.startswith(mark) for mark in self._marks.opening):
            self._state = "text"
        elif rest[0] in "[]":
            self._skip(1)
        elif self._marks.named and self._held:
            return self._named()
        else:
            self._give_up()
        return True

    def _skip(self, count: int) -> None:
        """Leave characters out, unless what follows is no call."""
        if self._held:
            self._held += self._pending[:count]
        self._pending = self._pending[count:]

    def _named(self) -> bool:
        """Read a name that stands before its arguments."""
        before, brace, _ = self._pending.partition("{")
        name = before.partition("[")[0].strip()
        if not brace and len(before) <= _MAX_NAME:
            return False
        if not brace or not name:
            self._give_up()
            return True
        self._call = CallReader(self._count, self._names, name)
        self._skip(len(before))
        self._state = "calling"
        return True

    def _calling(self) -> bool:
        assert self._call is not None
        if not self._pending:
            return False
        count, events = self._call.read(self._pending)
        self._made += events
        self._pending = self._pending[count:]
        if self._call.broken:
            self._give_up()
            return True
        if not self._call.done:
            return False
        self._call, self._held = None, ""
        self._count += 1
        self._state, self._blank = "between", True
        return True

    def _give_up(self) -> None:
        """Give as text what was no call, and look for marks in what follows."""
        read = self._held + (self._call.raw if self._call is not None else "")
        self._pending = read + self._pending
        self._call, self._held = None, ""
        self._state = "text"
        self._give(len(read))
