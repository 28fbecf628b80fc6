"""The engine process: `python -m inlaid.worker.process FD`. It loads the model, then steps the engine for whoever holds
the other end of the socket, and ends when that end closes.

`build_engine` puts the parts together; LLM calls it too, in its own process.
"""

from __future__ import annotations

import importlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from inlaid.config import EngineConfig
from inlaid.engine.engine import Engine, make_engine
from inlaid.engine.refusal import RefusalKind, Refused
from inlaid.engine.request import Grammar, NewRequest
from inlaid.worker import messages
from inlaid.worker.messages import AdapterInfo, ModelInfo

if TYPE_CHECKING:
    from inlaid.worker.loading import LoadedModel

log = logging.getLogger("inlaid.engine")

FACTORY = "inlaid.worker.process:build_engine"
_PAUSE = 0.001  # seconds between looks at what is loading, when there is nothing to compute
_MAX_FAILURES = 8  # steps that fail in a row before the process gives up
_READ_SIZE = 1 << 20
_READERS = 8  # adapter files read side by side at start-up
_AHEAD = 16  # adapters read and not yet taken at start-up, where host memory does not hold them all
_GRACE = 3.0  # seconds from the other end's closing to the end of this process, whatever it is doing
_MAX_COMPILING = 64  # requests whose grammars are being compiled, or wait for that


class Adapters(Protocol):
    """Adapters as the process handles them: `read` takes long and touches nothing shared, the rest is quick."""

    def read(self, path: str) -> Any: ...

    def install(self, name: str, adapter: Any, in_place: bool, seconds: float, pinned: bool | None = None) -> None: ...

    def remove(self, name: str) -> int: ...

    def leaving(self, identity: str) -> int:
        """Requests that still run on removed weights; 0 when their memory is free."""
        ...

    def describe(self, name: str) -> AdapterInfo: ...

    def list(self) -> list[AdapterInfo]: ...


@dataclass
class Loaded:
    """An engine that can be stepped, what it serves, and its adapters."""

    engine: Engine
    model: ModelInfo
    adapters: Adapters
    left_out: dict[str, str] = field(default_factory=dict)
    compile_grammar: Callable[[Grammar], object] | None = None  # and keep it for `add`; may take seconds, on a thread


def build_engine(config: EngineConfig, adapters: Mapping[str, str], *, strict: bool = True) -> Loaded:
    """Load the model and the adapters named. With strict an adapter that cannot be served raises; else it is left out
    and named."""
    began = time.monotonic()
    from inlaid.worker.loading import adapter_reader, load_model, open_model

    _leave_a_core_to_http()
    imported = time.monotonic()
    opened = open_model(config)
    read = adapter_reader(config.adapters, opened)
    with Readers(adapters, read, _AHEAD if config.adapters.max_cpu_adapter_gib else None) as readers:
        model = load_model(config, opened=opened, settle=readers.wait)
        made = time.monotonic()
        engine = make_engine(
            config,
            model.runner,
            time.monotonic,
            num_blocks=model.num_blocks,
            max_model_len=model.max_model_len,
            adapters=model.adapters,
            eos_ids=model.spec.eos_token_ids,
            base_version=model.base_version,
            make_grammar=model.grammars,
            pool=model.runner.pool,
        )
        directory = LoraAdapters(config, model, read)
        loaded = Loaded(engine, _describe(config, model), directory, compile_grammar=model.grammars)
        install(loaded, readers, strict)
    spent = process_age() - (time.monotonic() - began), imported - began, made - imported, time.monotonic() - made
    log.info("start-up: process %.1f s, imports %.1f s, model %.1f s, adapters %.1f s", *spent)
    return loaded


def process_age() -> float:
    """Seconds since this process began; where nothing tells when that was, those that it has computed."""
    if not Path("/proc/self/stat").exists():
        return time.process_time()
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _leave_a_core_to_http() -> None:
    """Threads of a matmul wait for each other in busy loops: with one for every core, the server beside this process
    makes each step many times slower. Who sets OMP_NUM_THREADS decides himself."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))


class Readers:
    """Adapters read from disk, several at a time, while the model is loaded: all, or `ahead` before they are taken."""

    def __init__(self, adapters: Mapping[str, str], read: Callable[[str], Any], ahead: int | None = None) -> None:
        import torch

        self._threads = torch.get_num_threads()
        alone = partial(torch.set_num_threads, 1)  # readers with a team of threads each would wait for one another
        self._pool = ThreadPoolExecutor(_READERS, "adapter-reader", alone)
        self._read, self._coming = read, iter(adapters.items())
        self.count = len(adapters)
        self.reads: deque[tuple[str, Future[tuple[Any, float]]]] = deque()
        for _ in range(self.count if ahead is None else ahead):
            self._begin_next()

    def wait(self) -> None:
        """Until each that was begun is read, or cannot be; with a progress bar when it takes long."""
        from tqdm import tqdm

        begun = [done for _, done in self.reads]
        for _ in tqdm(as_completed(begun), "reading adapters", total=len(begun), delay=1, leave=False):
            pass

    def __iter__(self) -> Iterator[tuple[str, Future[tuple[Any, float]]]]:
        """Each name, and its adapter with the seconds that reading took; nothing that was taken is kept here."""
        while self.reads:
            yield self.reads.popleft()
            self._begin_next()

    def _begin_next(self) -> None:
        for name, path in islice(self._coming, 1):
            self.reads.append((name, self._pool.submit(self._timed, path)))

    def _timed(self, path: str) -> tuple[Any, float]:
        started = time.monotonic()
        return self._read(path), time.monotonic() - started

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *error: object) -> None:
        import torch

        self._pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(self._threads)


def install(loaded: Loaded, readers: Readers, strict: bool) -> None:
    """One by one, with a progress bar when it takes long; with strict the first that cannot be served raises, else it
    is left out and named."""
    from tqdm import tqdm

    for name, done in tqdm(readers, "loading adapters", total=readers.count, delay=1, leave=False):
        try:
            adapter, seconds = done.result()
            loaded.adapters.install(name, adapter, False, seconds)
        except (ValueError, OSError) as error:
            if strict:
                raise
            loaded.left_out[name] = str(error)


def _describe(config: EngineConfig, model: LoadedModel) -> ModelInfo:
    return ModelInfo(
        folder=str(model.folder),
        vocab_size=model.spec.vocab_size,
        max_model_len=model.max_model_len,
        num_blocks=model.num_blocks,
        block_size=config.cache.block_size,
        max_loras=config.adapters.max_loras,
        base_version=model.base_version,
        device=str(model.runner.device),
        dtype=str(model.dtype).removeprefix("torch."),
        eos_ids=tuple(model.spec.eos_token_ids),
    )


class LoraAdapters:
    """The store, read from disk and described."""

    def __init__(self, config: EngineConfig, model: LoadedModel, read: Callable[[str], Any]) -> None:
        self._config = config.adapters
        self._model = model
        self.read = read

    def install(self, name: str, adapter: Any, in_place: bool, seconds: float, pinned: bool | None = None) -> None:
        store = self._model.adapters
        if pinned is None and store.identity(name) is None:
            pinned = name in self._config.pin_adapter
        if in_place:
            identity = store.replace(name, adapter, pinned)
        else:
            identity = store.add(name, adapter, bool(pinned))
        store.counts(identity).read_seconds = seconds

    def remove(self, name: str) -> int:
        return self._model.adapters.remove(name)

    def leaving(self, identity: str) -> int:
        return self._model.adapters.leaving(identity)

    def list(self) -> list[AdapterInfo]:
        return [self.describe(name) for name in self._model.adapters.names()]

    def describe(self, name: str) -> AdapterInfo:
        store = self._model.adapters
        identity = store.identity(name)
        if identity is None:
            raise ValueError(f"adapter {name!r} is not loaded")
        counts = store.counts(identity)
        return AdapterInfo(
            name=name,
            identity=identity,
            path=store.path(name),
            rank=store.rank(identity),
            bytes=store.nbytes(identity),
            tier=store.tier(identity),
            requests=store.references(identity),
            load_seconds=counts.read_seconds,
            on_host=store.on_host(identity),
            reads=counts.reads,
            loads=counts.loads,
            evictions=counts.evictions,
            hits=counts.hits,
            copy_seconds=counts.seconds,
            pinned=store.kept(name),
        )


class Calls:
    """What a Call may ask for: the public methods, by name."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded

    def stats(self) -> dict[str, float]:
        return self._loaded.engine.stats()

    def flush_cache(self) -> None:
        self._loaded.engine.scheduler.pool.clear()

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

    def fairness(self, window: float = 60.0) -> dict[str, Any]:
        return self._loaded.engine.fairness(window)


class EngineProcess:
    """The loop. Everything but reading adapter files and compiling grammars happens on its one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._framing = messages.Framing(messages.Command)
        self._poller = select.poll()
        self._poller.register(connection, select.POLLIN)
        self._readers = ThreadPoolExecutor(1, "adapter-reader")
        self._compilers = ThreadPoolExecutor(1, "grammar-compiler")
        self._compiling: set[str] = set()  # requests that wait for their grammar
        self._loading: dict[tuple[str, str, bool, bool | None], list[messages.Call]] = {}  # who waits for which adapter
        self._unloading: list[messages.Call] = []  # who waits for the last request on removed weights
        self._done: list[Callable[[], None]] = []  # what finished threads want done on this one
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._woken, False)
        self._poller.register(self._woken, select.POLLIN)

    def run(self) -> int:
        """Serve until the other end closes. The exit status."""
        start = self._first_message()
        threading.Thread(target=_end_with, args=(self._socket,), daemon=True).start()
        try:
            self._loaded = _factory(start.factory)(start.config, start.adapters, strict=start.strict)
        except Exception as error:
            expected = isinstance(error, (ValueError, OSError, ImportError, MemoryError))
            if not expected:
                log.error("the engine could not start", exc_info=error)
            self._send(messages.Fatal(message=str(error) if expected and str(error) else repr(error)))
            return 1
        self._engine = self._loaded.engine
        self._calls = Calls(self._loaded)
        self._send(
            messages.Ready(
                model=self._loaded.model, adapters=self._loaded.adapters.list(), left_out=self._loaded.left_out
            )
        )
        try:
            return self._loop()
        finally:
            self._close()

    def _close(self) -> None:
        try:
            self._engine.close()
        except OSError as error:
            log.error("what was learned about lengths could not be kept: %s", error)

    def _first_message(self) -> messages.Start:
        found: list[Any] = []
        while not found:
            data = self._socket.recv(_READ_SIZE)
            if not data:
                sys.exit(0)
            found = self._framing.feed(data)
        assert isinstance(found[0], messages.Start), "the first message is Start"
        self._early = found[1:]
        return found[0]

    def _loop(self) -> int:
        for command in self._early:
            self._obey(command)
        engine = self._engine
        while True:
            pause = None if not engine.has_work else _PAUSE if engine.idle else 0
            if not self._receive(pause):
                return 0
            if not engine.has_work:
                continue
            outputs = engine.step()
            if outputs:
                self._send(messages.Outputs(outputs=outputs))
            if self._unloading:
                self._tell_unloaded()
            if engine.num_failures_in_a_row >= _MAX_FAILURES:
                self._send(messages.Fatal(message=f"{_MAX_FAILURES} steps in a row failed; see the log"))
                return 1

    def _receive(self, pause: float | None) -> bool:
        """Obey what has come; wait for something for `pause` seconds (None: as long as it takes). False: closed."""
        for descriptor, _ in self._poller.poll(None if pause is None else pause * 1000):
            if descriptor == self._woken:
                os.read(self._woken, 4096)
                while self._done:
                    self._done.pop(0)()
                continue
            data = self._socket.recv(_READ_SIZE)
            if not data:
                return False
            for command in self._framing.feed(data):
                self._obey(command)
        return True

    def _obey(self, command: messages.Command) -> None:
        match command:
            case messages.Add(request=request) if request.params.grammar is not None and self._loaded.compile_grammar:
                self._add_when_compiled(request, request.params.grammar)
            case messages.Add(request=request):
                self._add(request)
            case messages.Abort(id=request_id, reason=reason):
                self._compiling.discard(request_id)
                self._engine.abort(request_id, reason)
            case messages.Call(name="load_adapter"):
                self._load_adapter(command)
            case messages.Call(name="until_unloaded"):
                self._unloading.append(command)
                self._tell_unloaded()
            case messages.Call():
                self._answer(command, lambda: self._dispatch(command))
            case _:
                log.error("unexpected message %r", command)

    def _add_when_compiled(self, request: NewRequest, grammar: Grammar) -> None:
        if len(self._compiling) >= _MAX_COMPILING:
            message = f"{_MAX_COMPILING} grammars are being compiled already"
            self._send(messages.Refusal(id=request.id, message=message, retry_after=1.0))
            return
        self._compiling.add(request.id)

        def add(compiled: Future[object]) -> None:
            if request.id in self._compiling:  # not aborted meanwhile
                self._compiling.discard(request.id)
                self._add(request, after=compiled)

        assert self._loaded.compile_grammar is not None
        self._on_thread(self._compilers, partial(self._loaded.compile_grammar, grammar), add)

    def _on_thread(
        self, threads: ThreadPoolExecutor, work: Callable[[], object], then: Callable[[Future[Any]], None]
    ) -> None:
        """Do work there, then something with its result here."""

        def wake(future: Future[Any]) -> None:
            self._done.append(partial(then, future))
            os.write(self._wake, b"!")

        threads.submit(work).add_done_callback(wake)

    def _add(self, request: NewRequest, after: Future[object] | None = None) -> None:
        refusal = partial(messages.Refusal, id=request.id)
        try:
            if after is not None:
                after.result()
            self._engine.add(request)
        except Refused as error:
            unknown = error.refusal.kind is RefusalKind.NOT_FOUND
            self._send(refusal(message=str(error), retry_after=error.retry_after, unknown=unknown))
        except ValueError as error:
            self._send(refusal(message=str(error), unknown=not self._has(request.adapter)))
        except Exception as error:
            log.error("request %s could not be added", request.id, exc_info=error)
            self._send(refusal(message=f"{type(error).__name__}: {error}", fault=True))

    def _has(self, adapter: str | None) -> bool:
        try:
            return adapter is None or bool(self._loaded.adapters.describe(adapter))
        except ValueError:
            return False

    def _dispatch(self, call: messages.Call) -> Any:
        if call.name.startswith("_") or not hasattr(Calls, call.name):
            raise ValueError(f"unknown call {call.name!r}")
        return getattr(self._calls, call.name)(**call.arguments)

    def _answer(self, call: messages.Call, ask: Callable[[], Any]) -> None:
        try:
            self._send(messages.Reply(call=call.call, value=ask()))
        except (ValueError, OSError) as error:
            self._send(messages.Failure(call=call.call, message=str(error)))
        except Exception as error:
            log.error("call %s failed", call.name, exc_info=error)
            self._send(messages.Failure(call=call.call, message=f"{type(error).__name__}: {error}", fault=True))

    def _load_adapter(self, call: messages.Call) -> None:
        """Read the files on a thread, then install the adapter on this one. Whoever asks for the same meanwhile gets
        the same answer."""
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
                self._loading.pop(key, None)  # who asks from now on may mean files that have changed since
            return self._loaded.adapters.read(path)

        def install(done: Future[Any]) -> AdapterInfo:
            self._loaded.adapters.install(name, done.result(), in_place, time.monotonic() - started, pinned)
            return self._loaded.adapters.describe(name)

        def finish(done: Future[Any]) -> None:
            if self._loading.get(key) is calls:
                del self._loading[key]
            self._answer_all(calls, partial(install, done))

        self._on_thread(self._readers, read, finish)

    def _tell_unloaded(self) -> None:
        leaving = {call.call: self._loaded.adapters.leaving(call.arguments["identity"]) for call in self._unloading}
        for call in self._unloading:
            if not leaving[call.call]:
                self._send(messages.Reply(call=call.call, value=None))
        self._unloading = [call for call in self._unloading if leaving[call.call]]

    def _answer_all(self, calls: list[messages.Call], ask: Callable[[], Any]) -> None:
        """Do it once and tell everyone."""
        outcome: Future[Any] = Future()
        try:
            outcome.set_result(ask())
        except Exception as error:  # noqa: BLE001 - each of them is told below
            outcome.set_exception(error)
        for call in calls:
            self._answer(call, outcome.result)

    def _send(self, message: messages.Event) -> None:
        self._socket.sendall(messages.frame(message))


def _factory(name: str) -> Callable[..., Loaded]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _end_with(connection: socket.socket) -> None:
    """End this process some seconds after the other end has closed, if a long load or step keeps it from ending."""
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP if hasattr(select, "POLLRDHUP") else 0)
    poller.poll()
    time.sleep(_GRACE)
    os._exit(0)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="engine: %(levelname)s %(message)s", stream=sys.stderr)
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        return EngineProcess(connection).run()
    except (BrokenPipeError, ConnectionResetError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
