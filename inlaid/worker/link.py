"""One life of the engine process as the server sees it: the process, its socket, and who waits for what from it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from inlaid.worker import messages
from inlaid.worker.errors import EngineDead, exception_of
from inlaid.worker.inbox import Inbox

READ_SIZE = 1 << 20


class Link:
    """A process that has been started or is about to be, with its readers and callers."""

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.ready: asyncio.Future[messages.Ready] = asyncio.get_running_loop().create_future()
        self.ready.add_done_callback(_mark_retrieved)
        self.inboxes: dict[str, Inbox] = {}
        self.calls: dict[int, asyncio.Future[Any]] = {}
        self.fatal: str | None = None
        self.load: messages.ReplicaLoad | None = None  # as last heard
        self._reader: asyncio.StreamReader | None = None
        self._submitting = asyncio.Lock()

    @property
    def serves(self) -> bool:
        """True once the process has loaded what it serves."""
        return self.ready.done() and self.ready.exception() is None

    @property
    def runs(self) -> bool:
        """True while there is a process."""
        return self.process is not None and self.process.returncode is None

    async def open(self, start: messages.Start, environment: Mapping[str, str]) -> asyncio.StreamReader:
        """Start the process, or the engine in one that waits."""
        if self._reader is None:
            await self.wait_ahead(environment)
        assert self._reader is not None
        self.send(start)
        return self._reader

    async def wait_ahead(self, environment: Mapping[str, str], modules: Sequence[str] = ()) -> None:
        """Start the process, which imports modules and waits for what it is to load."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = await start_process(theirs.fileno(), modules, environment)
        self._reader, self.writer = await asyncio.open_unix_connection(sock=ours, limit=READ_SIZE)

    def send(self, message: messages.Command) -> None:
        """Send a command, unless the connection is closing."""
        if self.writer is not None and not self.writer.is_closing():
            self.writer.write(messages.frame(message))

    async def submit(self, message: messages.Add) -> None:
        """Send a request once the process has taken enough of what was sent before. One at a time: each is encoded in a
        turn of its own of the event loop, which many long ones at once would hold up."""
        assert self.writer is not None
        async with self._submitting:
            await self.writer.drain()
            self.send(message)
            await asyncio.sleep(0)

    async def ask(self, number: int, method: str, arguments: dict[str, Any]) -> Any:
        """Call the process and return its answer. Unsendable: the arguments cannot cross the socket."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.calls[number] = answer
        try:
            self.send(messages.Call(call=number, name=method, arguments=arguments))
        except messages.Unsendable:
            del self.calls[number]
            raise
        return await answer

    def receive(self, event: messages.Event) -> None:
        """Hand an event to whoever waits for it."""
        match event:
            case messages.Outputs(outputs=outputs, load=load):
                self.load = load or self.load
                for output in outputs:
                    if (inbox := self.inboxes.get(output.id)) is not None:
                        inbox.put(output)
            case messages.Reply(call=call, value=value):
                if (answer := self.calls.pop(call, None)) is not None and not answer.done():
                    answer.set_result(value)
            case messages.Failure(call=call, refusal=refusal):
                if (answer := self.calls.pop(call, None)) is not None and not answer.done():
                    answer.set_exception(exception_of(refusal))
            case messages.Ready():
                self.ready.set_result(event)
            case messages.Fatal(message=message):
                self.fatal = message

    def fail(self, error: EngineDead) -> None:
        """Let everyone who waits raise an error."""
        for inbox in self.inboxes.values():
            inbox.fail(error)
        for answer in self.calls.values():
            if not answer.done():
                answer.set_exception(error)
        self.calls.clear()
        if not self.ready.done():
            self.ready.set_exception(error)

    async def close(self, patience: float = 5.0) -> None:
        """Ask the process to end by closing the socket; kill it if it does not."""
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
        """End the process now."""
        if self.process is not None and self.runs:
            self.process.kill()


async def start_process(
    descriptor: int, modules: Sequence[str], environment: Mapping[str, str]
) -> asyncio.subprocess.Process:
    """Start the engine process with one end of its connection. Tests put a fork in its place, which imports nothing."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "inlaid.worker.process",
        str(descriptor),
        *modules,
        pass_fds=(descriptor,),
        stdin=asyncio.subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def _mark_retrieved(future: asyncio.Future[Any]) -> None:
    """Stop asyncio from logging an exception that nobody awaited."""
    if not future.cancelled():
        future.exception()
