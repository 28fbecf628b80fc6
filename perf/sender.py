"""Sender of planned requests, on time, and observer of their answers. Used by `perf.client`.

Open loop: a request is sent when it is due, whether or not earlier ones have been answered; only the bound
on connections can hold it back, and then the record shows how late it was. Every stamp is taken when bytes
reach the process, from one clock that is passed in.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import aiohttp
import msgspec

from inlaid.workload.plan import PlannedRequest
from perf.protocols import Event, Protocol
from perf.records import Record, Status

REFUSED = (429, 503)


class Prepared(msgspec.Struct, frozen=True):
    """A request with everything that can be done before it is due already done."""

    request: PlannedRequest
    url: str
    body: bytes
    headers: dict[str, str]
    warmup: bool = False


class Observed:
    """State of one answer, as far as its stream has come."""

    def __init__(self, parse: Callable[[bytes], Event]) -> None:
        self.parse = parse
        self.pending = b""
        self.first = self.last = math.nan
        self.gaps: list[float] = []
        self.texts: list[str] = []
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.done = self.refused = False
        self.error = ""

    def feed(self, data: bytes, now: float) -> None:
        """Take bytes that arrived at `now`; events may be split anywhere."""
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(self.parse(line[5:].strip()), now)

    def _event(self, event: Event, now: float) -> None:
        if event.has_token:
            if self.texts:
                self.gaps.append(now - self.last)
            else:
                self.first = now
            self.last = now
            self.texts.append(event.text)
        self.done = self.done or event.done
        self.refused = self.refused or event.refused
        self.error = self.error or event.error
        if event.completion_tokens is not None:
            self.prompt_tokens, self.completion_tokens = event.prompt_tokens, event.completion_tokens

    def status(self) -> Status:
        if self.refused:
            return "refused"
        if self.error:
            return "error"
        return "ok" if self.done else "cut"


class Sender:
    """Owner of the bound on connections and of the clock; call `send` once per request."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        protocol: Protocol,
        clock: Callable[[], float],
        max_connections: int,
        keep_text: bool = False,
    ) -> None:
        self.session, self.protocol, self.clock, self.keep_text = session, protocol, clock, keep_text
        self.slots = asyncio.Semaphore(max_connections)
        self.start = clock()
        self.running = 0

    async def send(self, item: Prepared) -> Record:
        """Send a request and return its record, also if it fails or is cancelled."""
        seen = Observed(self.protocol.parse)
        sent, http_status, status, error = math.nan, None, "cancelled", ""
        try:
            async with self.slots:
                self.running += 1
                sent = self.clock()
                try:
                    async with self.session.post(item.url, data=item.body, headers=item.headers) as response:
                        http_status = response.status
                        await self._read(response, seen)
                finally:
                    self.running -= 1
            status, error = _judge(http_status, seen)
        except asyncio.CancelledError:
            pass  # Ctrl-C: what came so far is kept as a cancelled record
        except asyncio.TimeoutError:
            status, error = "timeout", f"no end within {self.session.timeout.total} s"
        except msgspec.DecodeError as problem:
            status, error = "error", f"unreadable event: {problem}"
        except (aiohttp.ClientError, OSError) as problem:
            status = "error" if http_status is None else "cut"
            error = f"{type(problem).__name__}: {problem}"
        return self._record(item, seen, sent, status, http_status, error)

    async def _read(self, response: aiohttp.ClientResponse, seen: Observed) -> None:
        if response.status != 200:
            seen.error = (await response.text(errors="replace"))[:300] or f"HTTP {response.status}"
            return
        async for data in response.content.iter_any():
            seen.feed(data, self.clock())

    def _record(
        self, item: Prepared, seen: Observed, sent: float, status: str, http_status: int | None, error: str
    ) -> Record:
        now, request = self.clock() - self.start, item.request
        never_sent = math.isnan(sent)
        chunks = len(seen.texts)
        return Record(
            index=request.index,
            adapter=request.adapter,
            tenant=request.tenant,
            service_class=request.service_class,
            due=round(request.at, 6),
            sent=round(now if never_sent else sent - self.start, 6),
            finished=round(now, 6),
            status=status,  # type: ignore[arg-type]  # one of Status by construction
            input_len=seen.prompt_tokens or request.prompt_len or 0,
            output_len=chunks if seen.completion_tokens is None else seen.completion_tokens,
            planned_output_len=request.output_len,
            ttft=None if math.isnan(seen.first) else round(seen.first - sent, 6),
            itls=[round(gap, 6) for gap in seen.gaps],
            http_status=http_status,
            error=error,
            text="".join(seen.texts) if self.keep_text else "",
            warmup=item.warmup,
        )


def _judge(http_status: int | None, seen: Observed) -> tuple[str, str]:
    if http_status in REFUSED:
        return "refused", seen.error
    if seen.status() == "cut":
        return "cut", "the stream ended before it said it was done"
    return seen.status(), seen.error


async def drive(
    sender: Sender, items: list[Prepared], on_record: Callable[[Record], None], stop: asyncio.Event
) -> None:
    """Send each item when it is due, report each record once, and return when all are answered.

    When `stop` is set nothing more is sent, what is in flight is cancelled, and its records are reported.
    """
    tasks: set[asyncio.Task[Record]] = set()
    faults: list[BaseException] = []
    answered = asyncio.Event()

    def finished(task: asyncio.Task[Record]) -> None:
        tasks.discard(task)
        answered.set()
        if not task.cancelled():
            fault = task.exception() or _report(on_record, task.result())
            if fault is not None:  # ours, or a disk that is full: end the run, and let it be raised below
                faults.append(fault)
                stop.set()

    stopping = asyncio.ensure_future(stop.wait())
    for item in items:
        delay = sender.start + item.request.at - sender.clock()
        await (asyncio.wait({stopping}, timeout=delay) if delay > 0 else asyncio.sleep(0))
        if stop.is_set():
            break
        task = asyncio.create_task(sender.send(item))
        tasks.add(task)
        task.add_done_callback(finished)
    while tasks and not stop.is_set():
        answered.clear()
        waiting = asyncio.ensure_future(answered.wait())
        await asyncio.wait({stopping, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
    await _cancel_all(tasks)
    stopping.cancel()
    if faults:
        raise faults[0]


def _report(on_record: Callable[[Record], None], record: Record) -> OSError | None:
    try:
        on_record(record)
    except OSError as error:
        return error
    return None


async def _cancel_all(tasks: set[asyncio.Task[Record]]) -> None:
    for task in list(tasks):
        task.cancel()
    while tasks:
        await asyncio.sleep(0)  # until the last record has been reported
