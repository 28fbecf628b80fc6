"""The engine process: `python -m inlaid.worker.process FD [MODULE …]`. It imports the modules named, loads the model
that the first message names, then steps the engine for whoever holds the other end of the socket, and ends when that
end closes.
"""

from __future__ import annotations

import importlib
import logging
import math
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from inlaid.engine.engine import Engine
from inlaid.engine.refusal import Refusal, RefusalKind
from inlaid.engine.request import FinishReason, NewRequest, Output
from inlaid.worker import lifetime, logs, messages, trim
from inlaid.worker.build import Loaded
from inlaid.worker.calls import Calls, refusal_of
from inlaid.worker.compiling import Compilations
from inlaid.worker.threads import Threads

log = logging.getLogger("inlaid.engine")

_PAUSE = 0.001  # seconds between looks at what is loading, when there is nothing to compute
_MAX_FAILURES = 8  # steps that fail in a row before the process looks whether the device still works
_READ_SIZE = 1 << 20
_REPORT_SECONDS = 0.1  # between two reports of the load


class EngineProcess:
    """The loop. Everything but reading adapter files and compiling grammars happens on its one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._framing = messages.Framing(messages.Command)
        self._threads = Threads()
        self._compilations: Compilations | None = None
        self._poller = select.poll()
        self._poller.register(connection, select.POLLIN)
        self._poller.register(self._threads.woken, select.POLLIN)

    def run(self) -> int:
        """Serve until the other end closes, and return the exit status."""
        start, *early = self._first_messages()
        lifetime.end_with(self._socket)
        try:
            more = {"image": start.image} if start.image else {}
            loaded = _factory(start.factory)(start.config, start.adapters, strict=start.strict, **more)
            self._restore(loaded.engine, start)
        except Exception as error:  # noqa: BLE001 - a defect is logged
            self._send(messages.Fatal(message=_why_not_started(error)))
            return 1
        self._loaded, self._engine = loaded, loaded.engine
        self._report_at = 0.0 if start.report_load else math.inf
        self._calls = Calls(loaded, self._threads, self._send)
        if loaded.lead is not None:
            loaded.lead.on_end = self._threads.wake
        if loaded.compile_grammar is not None:
            self._compilations = Compilations(loaded.compile_grammar, self._threads, self._add)
        self._send(messages.Ready(model=loaded.model, adapters=loaded.adapters.list(), left_out=loaded.left_out))
        try:
            for command in early:
                self._obey(command)
            return self._loop()
        finally:
            self._close()

    def _restore(self, engine: Engine, start: messages.Start) -> None:
        """Give the engine what was changed while the process before this one served, and report acceptances for the
        next one."""
        if start.scheduler:
            engine.set_scheduler(start.scheduler)
        limits = engine.scheduler.limits
        limits.accepted.restore(start.accepted, start.window)
        limits.on_accepted = lambda tenant, when, window: self._send(
            messages.Accepted(tenant=tenant, when=when, window=window)
        )

    def _close(self) -> None:
        try:
            self._engine.close()
        except OSError as error:
            log.error("what was learned about lengths could not be kept: %s", error)
        if self._loaded.lead is not None:
            self._loaded.lead.close()

    def _first_messages(self) -> list[Any]:
        """Return Start and what has come with it."""
        found: list[Any] = []
        while not found:
            data = self._socket.recv(_READ_SIZE)
            if not data:
                sys.exit(0)
            found = self._framing.feed(data)
        assert isinstance(found[0], messages.Start), "the first message is Start"
        return found

    def _loop(self) -> int:
        engine = self._engine
        while True:
            pause = None if not engine.has_work else _PAUSE if engine.idle else 0
            if not self._receive(pause):
                return 0
            if self._loaded.lead is not None and (broken := self._loaded.lead.fault()) is not None:
                self._send(messages.Fatal(message=broken))
                return 1
            if not engine.has_work:
                continue
            outputs = engine.step()
            if outputs:
                self._send(messages.Outputs(outputs=outputs, load=self._load()))
            self._calls.between_steps()
            if engine.num_failures_in_a_row >= _MAX_FAILURES and (fault := engine.probe()) is not None:
                text = f"{_MAX_FAILURES} steps in a row failed, and then one of a single token ({fault}); see the log"
                self._send(messages.Fatal(message=text))
                return 1

    def _load(self) -> messages.ReplicaLoad | None:
        """Return the engine's state, if it is wanted and was not told just now."""
        now = time.monotonic()
        if now < self._report_at:
            return None
        self._report_at = now + _REPORT_SECONDS
        scheduler = self._engine.scheduler
        return messages.ReplicaLoad(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_blocks=scheduler.pool.num_available,
            blocks=scheduler.pool.capacity,
            on_device=list(self._loaded.adapters.on_device()),
        )

    def _receive(self, pause: float | None) -> bool:
        """Obey what has come; wait for something for `pause` seconds (None: as long as it takes). False: closed."""
        for descriptor, _ in self._poller.poll(None if pause is None else pause * 1000):
            if descriptor == self._threads.woken:
                self._threads.finish()
                continue
            data = self._socket.recv(_READ_SIZE)
            if not data:
                return False
            for command in self._framing.feed(data):
                self._obey(command)
        return True

    def _obey(self, command: messages.Command) -> None:
        match command:
            case messages.Add(request=request):
                self._add(request)
            case messages.Abort(id=request_id, reason=reason, num_tokens=num_tokens):
                if self._compilations is not None:
                    self._compilations.discard(request_id)
                self._engine.abort(request_id, reason, num_tokens)
            case messages.Call():
                self._calls.receive(command)
            case _:
                log.error("unexpected message %r", command)

    def _add(self, request: NewRequest, compiled: Future[object] | None = None) -> None:
        """Hand a request to the engine, once its grammar, if it has one, is compiled."""
        try:
            if compiled is not None:
                compiled.result()
            elif request.params.grammar is not None and self._compilations is not None:
                self._compilations.submit(request)
                return
            self._engine.add(request)
        except Exception as error:  # noqa: BLE001 - refusal_of logs what nobody expects
            self._refuse(request.id, refusal_of(error, f"adding request {request.id}"))

    def _refuse(self, request_id: str, refusal: Refusal) -> None:
        output = Output(id=request_id, tokens=[], finish_reason=FinishReason.ERROR, refusal=refusal)
        self._send(messages.Outputs(outputs=[output]))

    def _send(self, message: messages.Event) -> None:
        """Send an event. One that cannot be sent fails alone: its call or its request hears so."""
        try:
            data = messages.frame(message)
        except messages.Unsendable as error:
            log.error("%s", error)
            self._send_instead(message, Refusal(str(error), RefusalKind.FAULT))
        else:
            self._socket.sendall(data)

    def _send_instead(self, message: messages.Event, refusal: Refusal) -> None:
        match message:
            case messages.Reply(call=call):
                self._send(messages.Failure(call=call, refusal=refusal))
            case messages.Outputs(outputs=[output]):
                self._engine.abort(output.id)
                self._refuse(output.id, refusal)
            case messages.Outputs(outputs=outputs):
                for output in outputs:
                    self._send(messages.Outputs(outputs=[output]))
            case _:
                raise AssertionError(f"{type(message).__name__} holds text only, which can always be sent")


def _why_not_started(error: Exception) -> str:
    """Return one sentence; a defect is logged with its traceback."""
    if isinstance(error, RuntimeError) and "allocate" in str(error):  # torch's own error, on a CPU and on a GPU
        first = str(error).partition("\n")[0]
        return f"not enough memory: lower --num-blocks, --max-loras or --max-model-len, or free some ({first})"
    expected = isinstance(error, (ValueError, OSError, ImportError, MemoryError))
    if not expected:
        log.error("the engine could not start", exc_info=error)
    return str(error) if expected and str(error) else repr(error)


def _factory(name: str) -> Callable[..., Loaded]:
    """Return the function behind "module:function"."""
    module, _, function = name.partition(":")
    factory: Callable[..., Loaded] = getattr(importlib.import_module(module), function)
    return factory


def main() -> int:
    """Serve the socket that the server has passed on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.configure_child("engine")
    lifetime.end_with_parent()
    trim.keep_giving_back()
    connection = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    if sys.argv[2:]:
        log.info("standby: libraries loaded, waiting for a model")
    try:
        return EngineProcess(connection).run()
    except (BrokenPipeError, ConnectionResetError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
