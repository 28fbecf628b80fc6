"""Adapters in host memory, within a budget of bytes. One that is known by its path but has had to give up its memory is
read again, on a thread, when it is wanted; files that are no longer the ones it was loaded from are refused. The store
is the only caller, on the engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from inlaid.adapters.loader import Arrival
from inlaid.adapters.peft import Adapter, AdapterEntry, AdapterError

log = logging.getLogger(__name__)

GRACE = 256  # wants that an adapter outlasts where it was loaded to before the request it was loaded for must run
_READERS = 2
_COPY_BYTES_PER_SECOND, _READ_BYTES_PER_SECOND, _FIXED_SECONDS = 2e10, 1e9, 1e-3  # roughly; only their ratios matter

Read = Callable[[str], Adapter]


@dataclass
class Resident:
    """An adapter's place on the device: its slot and, per entry, where its elements start in the pool."""

    slot: int
    starts: list[int]
    loaded: int  # the store's clock then
    arrival: Arrival | None = None  # None: it was copied at once
    shown: int = 0  # layer groups that the device's tables tell of
    used: bool = False  # whether it has been pinned since


@dataclass
class Counts:
    """What has happened to an adapter."""

    reads: int = 0  # from disk, after the first
    loads: int = 0  # to the device
    evictions: int = 0  # from the device, to make room
    hits: int = 0  # requests that found it on the device and did not have to wait for it
    read_seconds: float = 0.0  # disk to host, the last time
    seconds: float = 0.0  # host to device, the last time


@dataclass(eq=False)
class Held:
    """One identity: what is known of it always, and its weights when they are in host memory."""

    identity: str
    path: str
    entries: tuple[AdapterEntry, ...]
    nbytes: int
    flat: torch.Tensor | None = None
    reading: Future[tuple[Adapter, float]] | None = None
    failed: Exception | None = None  # why it cannot be had, until a new request tries again
    asked: float | None = None  # when loading it began, while it is under way
    names: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)  # those of its names that keep it on the device
    references: int = 0  # requests that resolved it and have not released it
    pins: int = 0  # scheduled requests that need it on the device
    resident: Resident | None = None
    last_used: int = 0  # the store's clock when it was last wanted or pinned
    fetched: int = 0  # the store's clock when it last came to the host
    popularity: int = 0  # requests since it came to the device
    value: float = 0.0  # of keeping it: grows with popularity and the cost of loading it again
    counts: Counts = field(default_factory=Counts)

    @cached_property
    def rank(self) -> int:
        """The largest of its modules'."""
        return max(entry.rank for entry in self.entries)

    @property
    def arriving(self) -> bool:
        arrival = self.resident.arrival if self.resident is not None else None
        return arrival is not None and not arrival.whole

    @property
    def reload_cost(self) -> float:
        """Seconds to bring it back to the device, per byte."""
        seconds = _FIXED_SECONDS + self.nbytes / _COPY_BYTES_PER_SECOND
        if self.flat is None:
            seconds += _FIXED_SECONDS + self.nbytes / _READ_BYTES_PER_SECOND
        return seconds / self.nbytes


class HostMemory:
    """The budget, and who is in it."""

    def __init__(self, held: Mapping[str, Held], budget: int = 0, read: Read | None = None, pin: bool = False) -> None:
        self.budget = budget  # bytes; 0: no limit
        self.used = 0
        self._held = held
        self._read = read
        self._pin = pin
        self._threads = ThreadPoolExecutor(_READERS, "adapter-reader")

    def keep(self, held: Held, flat: torch.Tensor, now: int) -> None:
        """Keep weights that have been read, if there is room; else they are read again when they are wanted."""
        if held.flat is not None:
            return
        self.drop(held)  # a read under way is no longer needed
        if not self._make_room(held, now):
            return
        self.used += held.nbytes
        held.flat, held.fetched = _pinned(flat) if self._pin else flat, now

    def fetch(self, held: Held, now: int) -> bool:
        """Whether its weights are here; if not they are being read, as soon as there is room."""
        if held.flat is None and held.failed is None:
            if held.reading is not None and held.reading.done():
                self._take(held, held.reading, now)
            elif held.reading is None and self._make_room(held, now):
                assert self._read is not None
                self.used += held.nbytes
                held.reading = self._threads.submit(_read_same, self._read, held.path, held.identity, self._pin)
        return held.flat is not None

    def drop(self, held: Held) -> None:
        """Give up its memory."""
        if held.flat is not None or held.reading is not None:
            self.used -= held.nbytes
        if held.reading is not None:
            held.reading.cancel()
        held.flat = held.reading = None

    def _take(self, held: Held, reading: Future[tuple[Adapter, float]], now: int) -> None:
        held.counts.reads += 1
        try:
            adapter, held.counts.read_seconds = reading.result()
            held.flat, held.reading, held.fetched = adapter.flat, None, now
        except (ValueError, OSError, MemoryError) as error:
            log.error("adapter %s could not be read again: %s", held.path, error)
            self.drop(held)
            held.failed = RuntimeError(_told(held, error))

    def _make_room(self, held: Held, now: int) -> bool:
        if not self.budget:
            return True
        idle = sorted(filter(partial(self._may_go, now=now), self._held.values()), key=_order)
        while self.used + held.nbytes > self.budget:
            if not idle:
                return False
            self.drop(idle.pop(0))
        return True

    def _may_go(self, held: Held, now: int) -> bool:
        """Not what the device is being loaded from, nor, for a while, what was read for a request that waits."""
        if held.flat is None or held.arriving or self._read is None or not held.path:
            return False
        return held.resident is not None or not held.references or now - held.fetched > GRACE


def _order(held: Held) -> tuple[bool, float, int]:
    return (bool(held.references), held.value, held.last_used)


def _told(held: Held, error: Exception) -> str:
    """The reason as its requests hear it: without paths."""
    if isinstance(error, AdapterError):
        return str(error).removeprefix(f"adapter {held.path}: ")
    more = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
    return f"it could not be read again{more}; the server's log says more"


def _read_same(read: Read, path: str, identity: str, pin: bool) -> tuple[Adapter, float]:
    """The adapter, and how many seconds that took."""
    started = time.monotonic()
    adapter = read(path)
    if adapter.identity != identity:
        raise AdapterError(
            f"adapter {path}: it has changed on disk since it was loaded, and its old weights are gone from memory; "
            "load it again (load_inplace)"
        )
    adapter = Adapter(identity, path, _pinned(adapter.flat), adapter.entries) if pin else adapter
    return adapter, time.monotonic() - started


def _pinned(flat: torch.Tensor) -> torch.Tensor:
    """Where the device can copy from by itself. Reading has put it there already, on its thread."""
    return flat if flat.is_pinned() else flat.pin_memory()
