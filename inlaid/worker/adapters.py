"""Adapters as the engine process handles them: read from disk several at a time at start-up, installed, described."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from inlaid.adapters.gate import check
from inlaid.config import EngineConfig
from inlaid.worker.messages import AdapterInfo

if TYPE_CHECKING:
    from inlaid.adapters.adapter import Adapter
    from inlaid.worker.loading import LoadedModel

_READERS = 8  # adapters read side by side


class Adapters(Protocol):
    """The adapters that a process serves: `read` takes long and touches nothing shared, the rest is quick."""

    def read(self, path: str) -> Any: ...

    def is_slow(self, path: str) -> bool:
        """Return True if reading the adapter takes seconds and more; never raises."""
        ...

    def install(self, name: str, adapter: Any, in_place: bool, seconds: float, pinned: bool | None = None) -> None: ...

    def remove(self, name: str) -> int: ...

    def leaving(self, identity: str) -> int:
        """Count the requests that still run on removed weights; 0 when their memory is free."""
        ...

    def describe(self, name: str) -> AdapterInfo: ...

    def list(self) -> list[AdapterInfo]: ...

    def on_device(self) -> Sequence[str]:
        """List the identities of the adapters that are on the device."""
        ...

    def parts(self, name: str) -> dict[str, dict[str, Any]]:
        """Return what an adapter changes: for each module its layers, ranks and scales."""
        ...

    def pin(self, name: str, pinned: bool) -> AdapterInfo:
        """Keep an adapter on the device from when it is there, or no longer."""
        ...


class LoraAdapters:
    """The adapters of a loaded model."""

    def __init__(
        self, config: EngineConfig, model: LoadedModel, read: Callable[[str], Any], read_ungated: Callable[[str], Any]
    ) -> None:
        self._config = config.adapters
        self._model = model
        self._gated_for = model.base_version  # the base that `read` asks the gate about, until it changes
        self.read, self.read_ungated = read, read_ungated

    def is_slow(self, path: str) -> bool:
        from inlaid.adapters.peft import decomposes_the_base

        return decomposes_the_base(path)

    def install(self, name: str, adapter: Any, in_place: bool, seconds: float, pinned: bool | None = None) -> None:
        self._check_gated(adapter)
        store = self._model.adapters
        if pinned is None and store.identity(name) is None:
            pinned = name in self._config.pin_adapter
        if in_place:
            identity = store.replace(name, adapter, pinned)
        else:
            identity = store.add(name, adapter, bool(pinned))
        counts = store.counts(identity)
        counts.read_seconds, counts.check_seconds = seconds, adapter.check_seconds

    def _check_gated(self, adapter: Adapter) -> None:
        """Ask the accuracy gate again where the base has changed since the adapter was read."""
        if self._config.require_eval and self._model.base_version != self._gated_for:
            check(self._config.require_eval, self._model.base_version, adapter.identity, self._config.max_drop)

    def remove(self, name: str) -> int:
        return self._model.adapters.remove(name)

    def leaving(self, identity: str) -> int:
        return self._model.adapters.leaving(identity)

    def on_device(self) -> Sequence[str]:
        return self._model.adapters.on_device()

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
            check_seconds=counts.check_seconds,
            on_host=store.on_host(identity),
            reads=counts.reads,
            loads=counts.loads,
            evictions=counts.evictions,
            hits=counts.hits,
            copy_seconds=counts.seconds,
            pinned=store.kept(name),
        )

    def parts(self, name: str) -> dict[str, dict[str, Any]]:
        store = self._model.adapters
        return store.parts(self.describe(name).identity)

    def pin(self, name: str, pinned: bool) -> AdapterInfo:
        self._model.adapters.pin_name(name, pinned)
        return self.describe(name)


class Readers:
    """Adapters being read, several at a time, while the model is loaded: all, or `ahead` before they are taken."""

    def __init__(self, adapters: Mapping[str, str], read: Callable[[str], Any], ahead: int | None = None) -> None:
        torch = sys.modules.get("torch")  # what reads adapters has imported it, unless it is a test's
        self._set_threads: Callable[[int], object] = torch.set_num_threads if torch else int
        self._threads: int = torch.get_num_threads() if torch else 0
        alone = partial(self._set_threads, 1)  # readers with a team of threads each would wait for one another
        self._pool = ThreadPoolExecutor(_READERS, "adapter-reader", alone)
        self._read, self._coming = read, iter(adapters.items())
        self.count = len(adapters)
        self.reads: deque[tuple[str, Future[tuple[Any, float]]]] = deque()
        for _ in range(self.count if ahead is None else ahead):
            self._begin_next()

    def wait(self) -> None:
        """Wait until each that was begun is read, or cannot be; with a progress bar when it takes long."""
        from inlaid.progress import Bar

        begun = [done for _, done in self.reads]
        for _ in Bar(as_completed(begun), "reading adapters", total=len(begun), delay=1, leave=False):
            pass

    def __iter__(self) -> Iterator[tuple[str, Future[tuple[Any, float]]]]:
        """Yield each name, and its adapter with the seconds that reading took; no adapter that was taken is kept."""
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
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._set_threads(self._threads)
