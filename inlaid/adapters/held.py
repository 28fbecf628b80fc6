"""The state of one adapter identity while the store holds it: its facts, its weights when they are in host memory, its
place when it is on the device.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property

import torch

from inlaid.adapters.adapter import Adapter, AdapterEntry
from inlaid.adapters.eviction import Claim, reload_cost
from inlaid.adapters.loader import Arrival
from inlaid.adapters.tables import size


@dataclass(eq=False)
class Resident:
    """An adapter's place on the device: its slot and, per entry, where its elements start in the pool."""

    slot: int
    starts: list[int]
    arrival: Arrival | None = None  # None: it was copied at once
    tokens: dict[int, torch.Tensor] = field(default_factory=dict)  # whose rows are replaced, by site, on the device


@dataclass
class Counts:
    """Events in the life of an adapter."""

    reads: int = 0  # from disk, after the first
    loads: int = 0  # to the device
    evictions: int = 0  # from the device, to make room
    hits: int = 0  # requests that found it on the device and did not have to wait for it
    read_seconds: float = 0.0  # disk to host, the last time
    fetch_seconds: float = 0.0  # disk to host, since it was last on the device; 0: it was in host memory
    check_seconds: float = 0.0  # of read_seconds, checking and laying out
    seconds: float = 0.0  # host to device, the last time


@dataclass(eq=False)
class Held(Claim):
    """One identity."""

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
    resident: Resident | None = None
    fetched: int = 0  # the store's clock when it last came to the host
    counts: Counts = field(default_factory=Counts)

    @cached_property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(entry.rank for entry in self.entries)

    @cached_property
    def num_elements(self) -> int:
        return sum(size(entry) for entry in self.entries)

    @property
    def is_arriving(self) -> bool:
        arrival = self.resident.arrival if self.resident is not None else None
        return arrival is not None and not arrival.whole

    @property
    def is_idle(self) -> bool:
        """True when no name and no request refers to it."""
        return not self.names and not self.references and not self.pins

    @property
    def reload_cost(self) -> float:
        return reload_cost(self.nbytes, self.flat is not None)

    @property
    def failure(self) -> Exception | None:
        """The reason why it does not come, if it does not."""
        arrival = self.resident.arrival if self.resident is not None else None
        return self.failed if arrival is None or arrival.error is None else RuntimeError(arrival.error)
