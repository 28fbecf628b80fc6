"""Feed: one state for all viewers. It is encoded once for each level of access, and a viewer that reads too slowly gets
a whole state instead of the deltas that it missed.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncGenerator, Mapping, Set
from types import MappingProxyType

import msgspec

from inlaid.console.state import Section, State, difference

MAX_VIEWERS = 32
_QUEUED = 4  # messages that wait for a slow viewer


class Level(enum.IntEnum):
    """The sections that a viewer may see: by an inference key, what an operator sees, and all."""

    READER = 0
    OPERATOR = 1
    ADMIN = 2


# The least level of a section, where that is not READER.
LEVELS: Mapping[str, Level] = MappingProxyType(
    {
        "tenants": Level.OPERATOR,
        "fairness": Level.OPERATOR,
        "scheduler": Level.OPERATOR,
        "service": Level.OPERATOR,
        "paths": Level.ADMIN,
        "tasks": Level.ADMIN,
        "base": Level.ADMIN,
    }
)


class TooManyViewers(RuntimeError):
    """No further page may be open."""


class _Viewer:
    def __init__(self, level: Level) -> None:
        self.level = level
        self.messages: asyncio.Queue[bytes | None] = asyncio.Queue(_QUEUED)
        self.behind = True  # it needs a whole state


class Feed:
    """The viewers, and the last state that was published."""

    def __init__(self, max_viewers: int = MAX_VIEWERS) -> None:
        self._max_viewers = max_viewers
        self._viewers: set[_Viewer] = set()
        self._state: State = {}
        self.watched = asyncio.Event()  # set while somebody looks

    @property
    def num_viewers(self) -> int:
        return len(self._viewers)

    @property
    def levels(self) -> Set[Level]:
        """The levels of those who look."""
        return {viewer.level for viewer in self._viewers}

    async def follow(self, level: Level) -> AsyncGenerator[bytes, None]:
        """Yield a whole state and then deltas, as server-sent events, until the feed is closed."""
        if len(self._viewers) >= self._max_viewers:
            raise TooManyViewers(f"{len(self._viewers)} pages of the console are open already; close one")
        viewer = _Viewer(level)
        self._viewers.add(viewer)
        self.watched.set()
        try:
            yield b": connected\n\n"
            while (message := await viewer.messages.get()) is not None:
                yield message
        finally:
            self._viewers.discard(viewer)
            if not self._viewers:
                self.watched.clear()

    def publish(self, state: State, history: Section) -> None:
        """Send a new state. `history` is what only a whole state holds: the past of what the deltas go on with."""
        delta = {name: msgspec.json.encode(part) for name, part in difference(self._state, state).items()}
        whole: dict[str, bytes] = {}
        if any(viewer.behind for viewer in self._viewers):
            whole = {name: msgspec.json.encode(section) for name, section in {**state, "history": history}.items()}
        self._state = state
        made: dict[tuple[Level, bool], bytes] = {}
        for viewer in self._viewers:
            if viewer.messages.full():
                viewer.behind = True
                continue
            key = viewer.level, viewer.behind
            if key not in made:
                name, sections = ("state", whole) if viewer.behind else ("delta", delta)
                made[key] = _event(name, sections, viewer.level)
            viewer.messages.put_nowait(made[key])
            viewer.behind = False

    def close(self) -> None:
        """End all streams."""
        for viewer in self._viewers:
            while viewer.messages.full():
                viewer.messages.get_nowait()
            viewer.messages.put_nowait(None)


def _event(name: str, sections: Mapping[str, bytes], level: Level) -> bytes:
    """Return a server-sent event of the sections that a level may see."""
    seen = [f'"{key}":'.encode() + data for key, data in sections.items() if LEVELS.get(key, Level.READER) <= level]
    return b"event: " + name.encode() + b"\ndata: {" + b",".join(seen) + b"}\n\n"
