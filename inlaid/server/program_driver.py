"""Driver: one program of a client on the engine process. A task for each call reads its answer; the run decides what
goes next. When the client leaves, the tasks end, and with them the calls.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any

from aiohttp import web

from inlaid.engine.refusal import RefusalKind, Refused
from inlaid.program.call import Call, encode
from inlaid.program.execute import Event, Run
from inlaid.program.values import Failure
from inlaid.server import answers
from inlaid.server.access import note_client
from inlaid.server.errors import reported
from inlaid.server.prepare import ClientRequest
from inlaid.server.service import Service
from inlaid.text.encoder import num_chars
from inlaid.text.stream import Piece
from inlaid.worker.errors import EngineDead, EngineError, RequestTimeout

_QUEUED = 256  # pieces that wait for the reader of results, before calls wait for it
_SHORT = 8192  # characters; longer prompts are encoded on a thread
_ENCODED_AT_ONCE = 16  # prompts between two turns of the event loop

Encoded = tuple[list[int], list[dict[str, str]]]


class Driver:
    """A run, and the tasks of its calls."""

    def __init__(
        self,
        request: web.Request,
        service: Service,
        run: Run,
        client: ClientRequest,
        tenant: Callable[[str | None], str],
        priority: int,
    ) -> None:
        self.run = run
        self.client = client
        self._request = request
        self._service = service
        self._tenant = tenant  # by the call's adapter
        self._priority = priority
        self._key = secrets.token_hex(12)
        self._news: asyncio.Queue[tuple[Call, Piece | Encoded | Exception]] = asyncio.Queue(_QUEUED)
        self._tasks: set[asyncio.Task[None]] = set()
        seconds = run.limits.seconds
        self._until = asyncio.get_running_loop().time() + seconds if seconds else None

    async def turns(self) -> AsyncGenerator[list[Event], None]:
        """Drive the run to its end, and yield the events of each turn."""
        run = self.run
        try:
            while True:
                await self._send()
                yield run.take_events()
                if run.done:
                    return
                try:
                    await self._take()
                except asyncio.TimeoutError:
                    run.stop(f"the program's {run.limits.seconds:g} s are over")
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self) -> None:
        """Encode and send all calls that can go now."""
        run = self.run
        count = 0
        while run.unencoded:
            call = run.unencoded.popleft()
            if not isinstance(call.words, str) or len(call.words) > _SHORT:
                self._start(self._encode(call))
            else:
                run.encode(call)
            count += 1
            if count % _ENCODED_AT_ONCE == 0:
                await asyncio.sleep(0)
            if not run.unencoded:
                self._send_calls()
        self._send_calls()

    def _send_calls(self) -> None:
        for call in self.run.take_calls():
            self.client.requests.append(
                call.request(
                    f"{self._key}-{len(self.client.requests)}",
                    self._tenant(call.adapter),
                    self._priority,
                    time.monotonic(),
                )
            )
            self.client.texts.append(None)
            if len(self.client.requests) == 1:
                note_client(self._request, self.client)
            self._start(self._read(call, len(self.client.requests) - 1))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _encode(self, call: Call) -> None:
        """Make the tokens of a chat, which waits for its template, or of a long prompt on a thread."""
        offload, size = self._service.offload, num_chars(call.words)
        run = offload.run if isinstance(call.words, str) else offload.run_chat
        try:
            made = await run(size, encode, call, self.run.plan.target)
            await self._news.put((call, made))
        except Exception as error:  # noqa: BLE001 - the call fails with it
            await self._news.put((call, error))

    async def _read(self, call: Call, index: int) -> None:
        """Read a call's answer."""
        try:
            async with aclosing(answers.pieces(self._service, self.client, index)) as pieces:
                async for piece in pieces:
                    await self._news.put((call, piece))
        except Exception as error:  # noqa: BLE001 - the call fails with it
            await self._news.put((call, error))

    async def _take(self) -> None:
        """Wait for news and give them to the run. TimeoutError: the program's time is over."""
        left = None if self._until is None else max(0.0, self._until - asyncio.get_running_loop().time())
        self._give(*await asyncio.wait_for(self._news.get(), left))
        with suppress(asyncio.QueueEmpty):
            while True:
                self._give(*self._news.get_nowait())

    def _give(self, call: Call, news: Piece | Encoded | Exception) -> None:
        if isinstance(news, Piece):
            self.run.take(call, news)
        elif isinstance(news, tuple):
            self.run.encoded(call, *news)
        elif isinstance(news, Refused) and news.refusal.kind is RefusalKind.TOO_MANY:
            self.run.full(call, news.refusal)
        else:
            self.run.fail(call, _failure(call, news))


def _failure(call: Call, error: Exception) -> Failure:
    """Return the value of a call that ended with an error."""
    match error:
        case Refused():
            return Failure.of(call.where, error.refusal)
        case EngineDead() | RequestTimeout():
            return Failure(call.where, str(error), RefusalKind.UNAVAILABLE)
        case EngineError():
            return Failure(call.where, str(error), RefusalKind.FAULT)
    return Failure(call.where, reported(error, f"the call {call.where} of a program").message, RefusalKind.FAULT)
