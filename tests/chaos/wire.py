"""HTTP as bytes: requests are sent as they are written, however broken, and answers are read leniently."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

_LONGEST = 1800.0  # seconds to wait for an answer: others may leave the server next to no time


@dataclass(frozen=True)
class Sent:
    """A request as bytes."""

    raw: bytes
    breaks: bool = False  # the connection cannot be used after it
    half: bool = False  # the client closes its side after it


@dataclass(frozen=True)
class Reply:
    """An answer; status 0: the connection closed without one. It is what some broken requests deserve."""

    status: int
    body: bytes
    seconds: float


def request(method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
    """Return a request as bytes; with a header that says the length unless the headers say something about it."""
    named = {name.lower() for name, _ in headers}
    if not named & {"content-length", "transfer-encoding"}:
        headers = [*headers, ("Content-Length", str(len(body)))]
    if "host" not in named:
        headers = [("Host", "test"), *headers]
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


class Wire:
    """A connection that is kept as long as it can be."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._pair: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, sent: Sent) -> Reply:
        """Send a request and return its answer. TimeoutError: none came, and the connection is still open."""
        started = time.monotonic()
        if self._pair is None:
            self._pair = await asyncio.open_connection(*self._address, limit=1 << 26)
        reader, writer = self._pair
        keep = False
        try:
            writer.write(sent.raw)
            if sent.half:
                writer.write_eof()
            status, body, keep = await asyncio.wait_for(_answer(reader, sent.raw.startswith(b"HEAD ")), _LONGEST)
        except (ConnectionError, asyncio.IncompleteReadError, BrokenPipeError):
            status, body = 0, b""
        finally:
            if sent.breaks or not keep:
                self.close()
        return Reply(status, body, time.monotonic() - started)

    def close(self) -> None:
        """Leave the connection."""
        if self._pair is not None:
            self._pair[1].transport.abort()
            self._pair = None


async def _answer(reader: asyncio.StreamReader, bodiless: bool) -> tuple[int, bytes, bool]:
    """Read one answer: its status, its body, and True if the connection stays open."""
    head = await reader.readuntil(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    keep = headers.get(b"connection") != b"close"
    if bodiless:
        return status, b"", False
    if headers.get(b"transfer-encoding") == b"chunked":
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
        return status, body, keep
    if b"content-length" in headers:
        length = int(headers[b"content-length"])
        return status, await reader.readexactly(length) if length and status != 304 else b"", keep
    return status, await reader.read() if not keep else b"", keep
