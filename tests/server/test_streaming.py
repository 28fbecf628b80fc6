"""A stream of events to a client that leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from inlaid.server import streaming


@pytest.mark.parametrize("fails", ["write", "write_eof"])
def test_a_client_that_leaves_at_any_write_is_no_error(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between the last event and the end of the answer; whatever makes the events is closed."""
    closed: list[str] = []

    class Response:
        def __init__(self, headers: Any) -> None:
            self.writes = 0

        async def prepare(self, request: Any) -> None: ...

        async def write(self, data: bytes) -> None:
            self.writes += 1
            if fails == "write" and self.writes == 2:
                raise ConnectionResetError

        async def write_eof(self) -> None:
            if fails == "write_eof":
                raise ConnectionResetError

    async def events() -> Any:
        try:
            for _ in range(3):
                yield b"data: 1\n\n"
        finally:
            closed.append("events")

    monkeypatch.setattr(web, "StreamResponse", Response)
    request: Any = None
    sent: Any = asyncio.run(streaming.send(request, events()))
    assert closed == ["events"]
    assert sent.writes == {"write": 2, "write_eof": 4}[fails]
