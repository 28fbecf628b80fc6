"""The calls that the server makes of the engine process. Most are answered at once by a method of Queries; loading an
adapter, waiting until one has gone, writing a weight image (images.py) and switching to another base (switch.py) are
answered when that is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from inlaid.engine.refusal import Refusal, RefusalKind, Refused
from inlaid.engine.remote import RemoteCharges
from inlaid.engine.step_log import Step
from inlaid.worker import messages
from inlaid.worker.build import Loaded
from inlaid.worker.messages import WAITED, AdapterInfo
from inlaid.worker.profiling import Profiler
from inlaid.worker.switch import SWITCH_CALLS, Switch
from inlaid.worker.threads import Threads

log = logging.getLogger("inlaid.engine")

_LoadKey = tuple[str, str, bool, bool | None]


def refusal_of(error: Exception, what: str) -> Refusal:
    """Return how an exception is reported to the server; one that nobody expects is a fault, and logged."""
    if isinstance(error, Refused):
        return error.refusal
    if isinstance(error, (ValueError, OSError)):
        return Refusal(str(error))
    log.error("%s failed", what, exc_info=error)
    return Refusal(f"{type(error).__name__}: {error}", RefusalKind.FAULT)


class Queries:
    """The calls that are answered at once: the public methods, by name."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._profiler = Profiler()
        self._remote = RemoteCharges(loaded.engine.scheduler.ledger)

    def stats(self) -> dict[str, float]:
        lead = self._loaded.lead
        waited = [] if lead is None else lead.group.waited()
        return self._loaded.engine.stats() | {f"{WAITED}{member}": seconds for member, seconds in enumerate(waited)}

    def flush_cache(self) -> None:
        self._loaded.engine.scheduler.pool.clear()

    def start_profile(self, folder: str) -> None:
        self._profiler.start(folder)

    def stop_profile(self) -> str:
        return self._profiler.stop()

    def adapters(self) -> list[AdapterInfo]:
        return self._loaded.adapters.list()

    def adapter(self, name: str) -> AdapterInfo:
        return self._loaded.adapters.describe(name)

    def unload_adapter(self, name: str) -> int:
        return self._loaded.adapters.remove(name)

    def scheduler(self) -> dict[str, Any]:
        return self._loaded.engine.describe_scheduler()

    def set_scheduler(self, changes: dict[str, Any]) -> dict[str, Any]:
        return self._loaded.engine.set_scheduler(changes)

    def charge_elsewhere(self, front: str, sums: dict[str, float]) -> None:
        self._remote.take(front, sums)

    def fairness(self, window: float = 60.0) -> dict[str, Any]:
        return self._loaded.engine.fairness(window)

    def queue(self, most: int = 20) -> list[dict[str, Any]]:
        return self._loaded.engine.queue(most)

    def service_history(self, seconds: float, pace: float) -> dict[str, Any]:
        return self._loaded.engine.service_history(seconds, pace)

    def steps(self) -> list[Step]:
        return self._loaded.engine.scheduler.step_log.list()

    def step_split(self) -> dict[str, float]:
        return {} if self._loaded.split is None else self._loaded.split.sums()

    def step_floor(self) -> dict[str, float]:
        return self._loaded.floor()

    def adapter_parts(self, name: str) -> dict[str, dict[str, Any]]:
        return self._loaded.adapters.parts(name)

    def pin_adapter(self, name: str, pinned: bool) -> AdapterInfo:
        return self._loaded.adapters.pin(name, pinned)


class Calls:
    """Calls under way, and their answers."""

    def __init__(self, loaded: Loaded, threads: Threads, send: Callable[[messages.Event], None]) -> None:
        self._loaded = loaded
        self._queries = Queries(loaded)
        self._threads = threads
        self._send = send
        self._loading: dict[_LoadKey, list[messages.Call]] = {}  # who waits for which adapter
        self._slow: list[str] = []  # names whose adapters are being read slowly, or wait for it
        self._unloading: list[messages.Call] = []  # who waits for the last request on removed weights
        self._switch = None if loaded.bases is None else Switch(loaded.engine, loaded.bases, threads, self._answer)

    def receive(self, call: messages.Call) -> None:
        """Answer a call, now or when it is done."""
        if call.name == "load_adapter":
            self._load_adapter(call)
        elif call.name == "write_image" and self._loaded.prepare_image is not None:
            write = self._loaded.prepare_image(call.arguments["path"])
            self._threads.read(write, lambda done: self._answer(call, done.result))
        elif call.name == "until_unloaded":
            self._unloading.append(call)
            self.report_unloaded()
        elif call.name in SWITCH_CALLS and self._switch is not None:
            self._switch.receive(call)
        else:
            self._answer(call, partial(self._query, call))

    def between_steps(self) -> None:
        """Do what waits for the end of a step: switch bases, and answer those who wait for requests to end."""
        if self._switch is not None:
            self._switch.between_steps()
        self.report_unloaded()

    def report_unloaded(self) -> None:
        """Answer those who wait for weights on which nothing runs any more."""
        for call in list(self._unloading):
            if not self._loaded.adapters.leaving(call.arguments["identity"]):
                self._unloading.remove(call)
                self._send(messages.Reply(call=call.call, value=None))

    def _query(self, call: messages.Call) -> Any:
        if call.name.startswith("_") or not hasattr(Queries, call.name):
            raise ValueError(f"unknown call {call.name!r}")
        return getattr(self._queries, call.name)(**call.arguments)

    def _answer(self, call: messages.Call, ask: Callable[[], Any]) -> None:
        try:
            answer: messages.Event = messages.Reply(call=call.call, value=ask())
        except Exception as error:  # noqa: BLE001 - refusal_of logs what nobody expects
            answer = messages.Failure(call=call.call, refusal=refusal_of(error, f"call {call.name}"))
        self._send(answer)

    def _load_adapter(self, call: messages.Call) -> None:
        """Read the files on a thread, then install the adapter on this one. Calls for the same adapter that come
        meanwhile share the answer. An adapter that takes long lets the others pass, but for later ones of its name."""
        started = time.monotonic()
        name, path, in_place = (call.arguments[key] for key in ("name", "path", "in_place"))
        pinned = call.arguments.get("pinned")
        key = (name, path, in_place, pinned)
        calls = self._loading.setdefault(key, [])
        calls.append(call)
        if len(calls) > 1:
            return

        def read() -> Any:
            if in_place:
                self._loading.pop(key, None)  # a later call may mean files that have changed since
            return self._loaded.adapters.read(path)

        def install(done: Future[Any]) -> AdapterInfo:
            self._loaded.adapters.install(name, done.result(), in_place, time.monotonic() - started, pinned)
            return self._loaded.adapters.describe(name)

        def finish(done: Future[Any]) -> None:
            if self._loading.get(key) is calls:
                del self._loading[key]
            self._answer_all(calls, partial(install, done))

        def finish_slowly(done: Future[Any]) -> None:
            self._slow.remove(name)
            finish(done)

        def choose(slow: Future[bool]) -> None:
            asked = slow.exception() is None and slow.result()  # what is wrong with it is told by reading it
            if asked or name in self._slow:
                self._slow.append(name)
                self._threads.read_slowly(read, finish_slowly)
            else:
                self._threads.read(read, finish)

        self._threads.read(lambda: self._loaded.adapters.is_slow(path), choose)

    def _answer_all(self, calls: list[messages.Call], ask: Callable[[], Any]) -> None:
        """Do it once and answer every call with the outcome."""
        outcome: Future[Any] = Future()
        try:
            outcome.set_result(ask())
        except Exception as error:  # noqa: BLE001 - each of them is told below
            outcome.set_exception(error)
        for call in calls:
            self._answer(call, outcome.result)
