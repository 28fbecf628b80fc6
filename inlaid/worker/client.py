"""AsyncEngine: the server's side of the engine process. It starts the process, sends requests, hands each its outputs
as they come, and brings the process back, or gives up, when it dies.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from inlaid.config import EngineConfig
from inlaid.engine.refusal import Refusal, RefusalKind
from inlaid.engine.request import FinishReason, NewRequest, Output
from inlaid.worker import messages
from inlaid.worker.messages import AdapterInfo, ModelInfo

log = logging.getLogger(__name__)

FACTORY = "inlaid.worker.process:build_engine"
_READ_SIZE = 1 << 20
_LONGEST_PAUSE = 30.0  # seconds between two starts
_MAX_STARTS = 5  # that fail in a row, before the engine is given up


class EngineError(RuntimeError):
    """Something on our side went wrong."""


class EngineDead(EngineError):
    """The engine process is not there (yet, or any more)."""


class NotNow(EngineError):
    """What the request needs is not there; after retry_after seconds it may be."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestTimeout(EngineError):
    """The request took longer than it may."""


class RequestRefused(ValueError):
    """The engine does not take this request, or cannot do what it asks. With retry_after, it may later."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class AdapterGone(RequestRefused):
    """The request's adapter was unloaded while it was on its way."""


class _Inbox:
    """Outputs of one request on their way to its reader. What is not read yet is kept as one Output, so that a slow
    reader costs no more than the tokens of its answer."""

    def __init__(self) -> None:
        self._output: Output | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        self._output = output if self._output is None else merge(self._output, output)
        self._wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    async def get(self) -> Output:
        """The next output. An error comes first, unless the answer is complete already."""
        while self._output is None or (self._error is not None and self._output.finish_reason is None):
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        output, self._output = self._output, None
        return output

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def merge(first: Output, second: Output) -> Output:
    """Two consecutive outputs of one request as one."""
    logprobs = first.logprobs
    if second.logprobs is not None:
        logprobs = [*(first.logprobs or []), *second.logprobs]
    return msgspec.structs.replace(
        first,
        tokens=first.tokens + second.tokens,
        logprobs=logprobs,
        prompt_logprobs=second.prompt_logprobs if first.prompt_logprobs is None else first.prompt_logprobs,
        finish_reason=second.finish_reason,
        stop_token=second.stop_token,
        num_cached=max(first.num_cached, second.num_cached),
        queue_time=second.queue_time if first.queue_time is None else first.queue_time,
        refusal=second.refusal,
    )


class _Link:
    """One life of the engine process: the process, its socket, and who waits for what from it."""

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.ready: asyncio.Future[messages.Ready] = asyncio.get_running_loop().create_future()
        self.ready.add_done_callback(_look_at)  # perhaps nobody waits for it
        self.inboxes: dict[str, _Inbox] = {}
        self.calls: dict[int, asyncio.Future[Any]] = {}
        self.fatal: str | None = None

    async def open(self, start: messages.Start, environment: Mapping[str, str]) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "inlaid.worker.process",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, **environment},
            )
        reader, self.writer = await asyncio.open_unix_connection(sock=ours, limit=_READ_SIZE)
        self.send(start)
        return reader

    def send(self, message: messages.Command) -> None:
        if self.writer is not None and not self.writer.is_closing():
            self.writer.write(messages.frame(message))

    def receive(self, event: messages.Event) -> None:
        match event:
            case messages.Outputs(outputs=outputs):
                for output in outputs:
                    if (inbox := self.inboxes.get(output.id)) is not None:
                        inbox.put(output)
            case messages.Refusal(id=request_id):
                if (inbox := self.inboxes.get(request_id)) is not None:
                    inbox.fail(_refusal(event))
            case messages.Reply(call=call, value=value):
                if (answer := self.calls.pop(call, None)) is not None and not answer.done():
                    answer.set_result(value)
            case messages.Failure(call=call, message=message, fault=fault):
                if (answer := self.calls.pop(call, None)) is not None and not answer.done():
                    answer.set_exception(EngineError(message) if fault else ValueError(message))
            case messages.Ready():
                self.ready.set_result(event)
            case messages.Fatal(message=message):
                self.fatal = message

    def fail(self, error: EngineDead) -> None:
        """Nobody waits for ever."""
        for inbox in self.inboxes.values():
            inbox.fail(error)
        for answer in self.calls.values():
            if not answer.done():
                answer.set_exception(error)
        self.calls.clear()
        if not self.ready.done():
            self.ready.set_exception(error)

    async def close(self, patience: float = 5.0) -> None:
        """Closing the socket asks the process to end; killing it makes sure."""
        if self.writer is not None:
            self.writer.close()
        if self.process is None:
            return
        try:
            await asyncio.wait_for(self.process.wait(), patience)
        except asyncio.TimeoutError:
            self.kill()
            await self.process.wait()

    def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()


def _look_at(future: asyncio.Future[Any]) -> None:
    """An exception that was looked at is not reported as lost."""
    if not future.cancelled():
        future.exception()


def _refusal(event: messages.Refusal) -> Exception:
    if event.unknown:
        return AdapterGone(event.message)
    return EngineError(event.message) if event.fault else RequestRefused(event.message, event.retry_after)


def _failure(output: Output) -> Exception:
    refusal = output.refusal or Refusal("the request failed in the engine", RefusalKind.FAULT)
    if refusal.kind is RefusalKind.FAULT:
        return EngineError(refusal.message)
    if refusal.kind is RefusalKind.UNAVAILABLE:
        return NotNow(refusal.message, refusal.retry_after or 1.0)
    return RequestRefused(refusal.message, refusal.retry_after)


def _timer(inbox: _Inbox, timeout: float) -> asyncio.TimerHandle:
    error = RequestTimeout(f"the request was not done within the {timeout:g} s that this server allows")
    return asyncio.get_running_loop().call_later(timeout, inbox.fail, error)


class AsyncEngine:
    """The engine process as asyncio sees it."""

    def __init__(
        self,
        config: EngineConfig,
        adapters: Mapping[str, str] | None = None,
        *,
        on_death: str = "restart",
        timeout: float = 0.0,
        give_up: Callable[[str], None] = lambda reason: None,
        factory: str = FACTORY,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.adapters: dict[str, AdapterInfo] = {}  # by name, as last heard
        self.model: ModelInfo | None = None
        self.num_restarts = 0
        self.last_death: str | None = None  # why, until it is back
        self._paths = dict(adapters or {})
        self._on_death = on_death
        self._timeout = timeout  # seconds without an answer after which the process is taken for dead; 0: never
        self._give_up = give_up
        self._factory = factory
        self._environment = {"PYTHONPATH": _import_path(), **(environment or {})}
        self._link: _Link | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._closing = False
        self._numbers = itertools.count(1)
        self._looking = asyncio.Lock()
        self._num_looks = 0  # at all adapters, begun
        self._last_look = 0  # the last that was answered, and what it found
        self._listed: list[AdapterInfo] = []

    @property
    def ready(self) -> bool:
        link = self._link
        return link is not None and link.ready.done() and link.ready.exception() is None

    @property
    def process_id(self) -> int | None:
        return None if self._link is None or self._link.process is None else self._link.process.pid

    @property
    def num_requests(self) -> int:
        return 0 if self._link is None else len(self._link.inboxes)

    async def start(self) -> ModelInfo:
        """Start the process and wait until it serves. EngineDead: why it cannot."""
        link = self._link = _Link()
        self._keeper = asyncio.create_task(self._keep(link))
        ready = await asyncio.shield(link.ready)
        return ready.model

    async def generate(self, request: NewRequest, timeout: float = 0.0) -> AsyncGenerator[Output, None]:
        """Outputs until one has a finish_reason. Left early (closed, cancelled, timed out), the request is aborted, so
        close it: `async with aclosing(engine.generate(…))`. RequestRefused, RequestTimeout, NotNow, EngineDead,
        EngineError."""
        link = self._live()
        inbox = link.inboxes[request.id] = _Inbox()
        over = False
        timer = _timer(inbox, timeout) if timeout > 0 else None
        try:
            link.send(messages.Add(request=request))
            assert link.writer is not None
            await link.writer.drain()
            while not over:
                output = await inbox.get()
                over = output.finish_reason is not None
                if output.finish_reason is FinishReason.ERROR:
                    raise _failure(output)
                yield output
        except (RequestRefused, EngineDead):
            over = True
            raise
        except ConnectionError as error:
            raise EngineDead("the engine process has closed its connection") from error
        finally:
            if timer is not None:
                timer.cancel()
            del link.inboxes[request.id]
            if not over:
                link.send(messages.Abort(id=request.id))

    def stop(self, request_id: str) -> None:
        """A stop string was found: the answer is whole, whatever else the engine would make."""
        if self._link is not None:
            self._link.send(messages.Abort(id=request_id, reason=FinishReason.STOP))

    async def call(self, method: str, /, **arguments: Any) -> Any:
        """Ask the engine something, see process.Calls. ValueError: it refuses; EngineDead."""
        return await self._ask(self._live(), method, arguments)

    async def _ask(self, link: _Link, method: str, arguments: dict[str, Any]) -> Any:
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        link.calls[number] = answer
        link.send(messages.Call(call=number, name=method, arguments=arguments))
        return await answer

    async def load_adapter(
        self, name: str, path: str, in_place: bool = False, pinned: bool | None = None
    ) -> AdapterInfo:
        """Serve an adapter from a folder; with in_place it may replace one of that name. Pinned it stays on the device
        (None: as it was, or as the configuration says)."""
        value = await self.call("load_adapter", name=name, path=path, in_place=in_place, pinned=pinned)
        info = msgspec.convert(value, AdapterInfo)
        self.adapters[name] = info
        self._paths[name] = path
        self._remember_pin(name, info.pinned)
        return info

    def _remember_pin(self, name: str, pinned: bool) -> None:
        """For the next life of the process."""
        others = tuple(other for other in self.config.adapters.pin_adapter if other != name)
        adapters = replace(self.config.adapters, pin_adapter=(*others, name) if pinned else others)
        self.config = replace(self.config, adapters=adapters)

    async def unload_adapter(self, name: str, patience: float = 0.0) -> int:
        """Forget an adapter at once, and wait so long for the requests that run on it. How many still do."""
        known = self.adapters.get(name)
        in_flight = int(await self.call("unload_adapter", name=name))
        self.adapters.pop(name, None)
        self._paths.pop(name, None)
        self._remember_pin(name, False)
        if in_flight and known is not None and patience > 0:
            try:
                await asyncio.wait_for(self.call("until_unloaded", identity=known.identity), patience)
                return 0
            except asyncio.TimeoutError:
                pass
        return in_flight

    async def list_adapters(self) -> list[AdapterInfo]:
        """The step loop tells them once at a time, however many ask: who asks while it does shares the next time."""
        came = self._num_looks
        async with self._looking:
            if self._last_look <= came:
                number = self._num_looks = self._num_looks + 1
                listed = msgspec.convert(await self.call("adapters"), list[AdapterInfo])
                self.adapters = {info.name: info for info in listed}
                self._listed, self._last_look = listed, number
            return self._listed

    async def describe_adapter(self, name: str) -> AdapterInfo:
        """ValueError: there is none of that name."""
        return msgspec.convert(await self.call("adapter", name=name), AdapterInfo)

    async def close(self) -> None:
        """End the process; what is in flight fails."""
        self._closing = True
        link, keeper = self._link, self._keeper
        if link is not None:
            link.fail(EngineDead("the server is shutting down"))
            await link.close()
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    def kill(self) -> None:
        """End the process now, without a word."""
        self._closing = True
        if self._link is not None:
            self._link.kill()

    def _live(self) -> _Link:
        if self._link is None or not self.ready:
            because = f": {self.last_death}" if self.last_death else ""
            raise EngineDead(f"the engine is not ready{because}")
        return self._link

    async def _keep(self, link: _Link) -> None:
        """Follow the process through its lives."""
        num_failed = 0
        strict = True
        while True:
            reason = await self._live_once(link, strict)
            if self._closing:
                return
            came_up = link.ready.done() and link.ready.exception() is None
            num_failed = 0 if came_up else num_failed + 1
            self.last_death = reason
            self._link = None
            link.fail(EngineDead(reason))
            first = strict and not came_up
            strict = False
            if first:
                return  # start() raises
            log.error("%s", reason)
            if self._on_death == "exit" or num_failed >= _MAX_STARTS:
                self._give_up(reason)
                return
            await asyncio.sleep(min(_LONGEST_PAUSE, 2.0**num_failed - 1))
            self.num_restarts += 1
            log.warning("starting the engine process again")
            link = self._link = _Link()

    async def _live_once(self, link: _Link, strict: bool) -> str:
        """One life, from start to death. Why it ended."""
        start = messages.Start(config=self.config, adapters=dict(self._paths), factory=self._factory, strict=strict)
        framing = messages.Framing(messages.Event)
        watch = asyncio.create_task(self._watch(link))
        try:
            reader = await link.open(start, self._environment)
            while data := await reader.read(_READ_SIZE):
                for event in framing.feed(data):
                    if isinstance(event, messages.Ready):
                        self._welcome(event)
                    link.receive(event)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.error("the connection to the engine process broke", exc_info=error)
        finally:
            watch.cancel()
        await link.close()
        status = None if link.process is None else link.process.returncode
        return link.fatal or f"the engine process ended with status {status}"

    async def _watch(self, link: _Link) -> None:
        """End a process that serves but has stopped answering, so that it is treated like any other dead one."""
        if not self._timeout:
            return
        try:
            await asyncio.shield(link.ready)
            while True:
                await asyncio.sleep(self._timeout / 4)
                await asyncio.wait_for(self._ask(link, "stats", {}), self._timeout)
        except asyncio.TimeoutError:
            link.fatal = f"the engine process has not answered for {self._timeout:g} s"
            link.kill()
        except EngineDead:
            pass  # it has ended by itself

    def _welcome(self, ready: messages.Ready) -> None:
        self.model = ready.model
        self.adapters = {info.name: info for info in ready.adapters}
        self.last_death = None
        for name, reason in ready.left_out.items():
            log.error("adapter %s is left out: %s", name, reason)
            self._paths.pop(name, None)


def _import_path() -> str:
    """Where this process found inlaid (and whatever else), so that the child finds the same."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
