"""Adapters in host memory, within a budget of bytes. One that is known by its path but has had to give up its memory is
read again, on a thread, when it is wanted; files that are no longer the ones it was loaded from are refused. The
residency is the only caller, on the engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from inlaid.adapters.adapter import Adapter, AdapterError, printable
from inlaid.adapters.eviction import GRACE
from inlaid.adapters.held import Held

log = logging.getLogger(__name__)

_READERS = 2

Read = Callable[[str], Adapter]


class HostMemory:
    """A budget of bytes, and the adapters that take it up."""

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
        """Say whether its weights are here; if not, have them read as soon as there is room."""
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

    def check(self) -> None:
        """Assert that every byte is accounted for."""
        in_memory = [held for held in self._held.values() if held.flat is not None or held.reading is not None]
        assert self.used == sum(held.nbytes for held in in_memory), "host bytes"
        assert not self.budget or self.used <= self.budget, "over the host's budget"

    def _take(self, held: Held, reading: Future[tuple[Adapter, float]], now: int) -> None:
        held.counts.reads += 1
        try:
            adapter, held.counts.read_seconds = reading.result()
            held.counts.fetch_seconds = held.counts.read_seconds
            held.counts.check_seconds = adapter.check_seconds
            held.flat, held.reading, held.fetched = adapter.flat, None, now
        except (ValueError, OSError, MemoryError) as error:
            log.error("adapter %s could not be read again: %s", printable(held.path), printable(str(error)))
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
        """Protect what the device is being loaded from and, for a while, what was read for a request that waits."""
        if held.flat is None or held.is_arriving or self._read is None or not held.path:
            return False
        return held.resident is not None or not held.references or now - held.fetched > GRACE


def _order(held: Held) -> tuple[bool, float, int]:
    return (bool(held.references), held.value, held.last_used)


def _told(held: Held, error: Exception) -> str:
    """Return the reason for clients: without paths."""
    if isinstance(error, AdapterError):
        return str(error).removeprefix(printable(f"adapter {held.path}: "))
    more = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
    return f"it could not be read again{more}; the server's log says more"


def _read_same(read: Read, path: str, identity: str, pin: bool) -> tuple[Adapter, float]:
    """Read an adapter that must be the same as before; returns it and the seconds that took."""
    started = time.monotonic()
    adapter = read(path)
    if adapter.identity != identity:
        raise AdapterError(
            f"adapter {path}: it has changed on disk since it was loaded, and its old weights are gone from memory; "
            "load it again (load_inplace)"
        )
    adapter = replace(adapter, flat=_pinned(adapter.flat)) if pin else adapter
    return adapter, time.monotonic() - started


def _pinned(flat: torch.Tensor) -> torch.Tensor:
    """Return weights in memory that the device can copy from by itself; mostly the reader has put them there."""
    return flat if flat.is_pinned() else flat.pin_memory()
