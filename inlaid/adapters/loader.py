"""Copies of adapters from host memory to the device, layer group by layer group, while the step loop goes on. The store
starts a copy and keeps its arrival; the forward asks the arrival how far it has come, or waits for it. There are two
ways to copy: `Loader`, a thread, where memory is copied by the CPU; and `StreamLoader`, which queues everything on a
lane of its own with a mark behind each group, where the device copies (`CudaLane`: a stream and its events). A link
model makes the thread's copies take as long as they would over a bus, for experiments without a GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

Copy = tuple[torch.Tensor, torch.Tensor]  # to, from
Clock = Callable[[], float]


class Arrival(Protocol):
    """The progress of one adapter on its way to the device."""

    num_groups: int
    error: str | None  # why the rest will not come
    seconds: float  # from being asked for to the last group that was seen to be there

    @property
    def landed(self) -> int:
        """Groups that are in place for everything that is computed from now on."""
        ...

    @property
    def whole(self) -> bool: ...

    def wait(self, group: int, timeout: float) -> None:
        """Put a group in place for everything that is computed from now on. RuntimeError when it does not come."""
        ...

    def end(self) -> None:
        """Stop: its pages may be given to another, whose bytes it will not overwrite."""
        ...


class CopiedByHost:
    """An arrival that the loader's thread writes and anyone reads; waiting for it holds up the host."""

    def __init__(self, num_groups: int, clock: Clock = time.monotonic) -> None:
        self.num_groups = num_groups
        self.landed = 0
        self.error: str | None = None
        self.cancelled = False
        self.seconds = 0.0
        self._clock = clock
        self._asked = clock()
        self._changed = threading.Condition()
        self.copying = threading.Lock()  # held while a group is being copied

    def end(self) -> None:
        self.cancelled = True
        with self.copying:
            pass  # the group that is being copied is the last

    @property
    def whole(self) -> bool:
        return self.landed >= self.num_groups

    def land(self) -> None:
        """Note that one more group is in place."""
        with self._changed:
            self.landed += 1
            self.seconds = self._clock() - self._asked
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        with self._changed:
            self.error = reason
            self._changed.notify_all()

    def wait(self, group: int, timeout: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.landed > group or self.error is not None, timeout)
            if self.landed <= group:
                raise RuntimeError(self.error or f"an adapter did not arrive within {timeout:g} s")


@dataclass(frozen=True)
class Transfer:
    """The copies of one adapter, by layer group."""

    groups: list[list[Copy]]
    arrival: CopiedByHost

    def copy_next(self) -> int:
        """Copy the group that is next, without calling it landed; returns its bytes."""
        copies = self.groups[self.arrival.landed]
        for target, source in copies:
            target.copy_(source)
        return sum(source.nbytes for _, source in copies)


class AnyLoader(Protocol):
    """The part of a loader that the store calls."""

    def start(self, groups: list[list[Copy]], clock: Clock) -> Arrival:
        """Copy all this, group by group, after what has been started before."""
        ...


class Loader:
    """One thread, first come first served. Later transfers may take the place of cancelled earlier ones: their copies
    come after, as on a stream."""

    def __init__(self, gigabytes_per_second: float = 0.0) -> None:
        self._rate = gigabytes_per_second * 1e9
        self._thread = ThreadPoolExecutor(1, "adapter-loader")

    def start(self, groups: list[list[Copy]], clock: Clock) -> Arrival:
        transfer = Transfer(groups, CopiedByHost(len(groups), clock))
        self._thread.submit(self._run, transfer)
        return transfer.arrival

    def _run(self, transfer: Transfer) -> None:
        arrival = transfer.arrival
        try:
            while not arrival.whole:
                began = time.monotonic()
                with arrival.copying:
                    if arrival.cancelled:
                        return
                    nbytes = transfer.copy_next()
                if self._rate:
                    time.sleep(max(0.0, nbytes / self._rate - (time.monotonic() - began)))
                arrival.land()
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the waiting step must hear of it
            arrival.fail(f"copying an adapter to the device failed: {type(error).__name__}: {error}")


class Mark(Protocol):
    """A point in a lane: it has been passed when all that was queued before it is copied."""

    def query(self) -> bool: ...

    def wait(self) -> None:
        """Order everything that the device computes from now on behind this point; the host goes on."""
        ...


class Lane(Protocol):
    """A queue of copies that the device makes in order, beside its computing."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None: ...

    def mark(self) -> Mark: ...


class CopiedByDevice:
    """An arrival along a lane. Waiting holds up the device's computing, never the host; a group that computing has been
    told to wait for counts as landed."""

    error: str | None = None  # a device that cannot copy does not come back

    def __init__(self, marks: list[Mark], clock: Clock) -> None:
        self.num_groups = len(marks)
        self.seconds = 0.0
        self._marks = marks
        self._landed = 0
        self._clock = clock
        self._asked = clock()

    @property
    def landed(self) -> int:
        while self._landed < self.num_groups and self._marks[self._landed].query():
            self._landed += 1
            self.seconds = self._clock() - self._asked
        return self._landed

    @property
    def whole(self) -> bool:
        return self.landed >= self.num_groups

    def wait(self, group: int, timeout: float) -> None:
        if self.landed <= group:
            self._marks[group].wait()
            self._landed = group + 1

    def end(self) -> None:
        if not self.whole:
            self._marks[-1].wait()


class StreamLoader:
    """Queues an adapter's copies on a lane at once. Pages that another adapter gave up may be written without waiting
    for the device's computing: they were pinned until the last step that read them was collected."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    def start(self, groups: list[list[Copy]], clock: Clock) -> Arrival:
        marks = []
        for copies in groups:
            for target, source in copies:
                self._lane.copy(target, source)
            marks.append(self._lane.mark())
        return CopiedByDevice(marks, clock)


class _CudaMark:
    """An event on a lane's stream."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def query(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.wait()


class CudaLane:
    """A stream. From pinned memory its copies run beside the kernels."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        event: torch.cuda.Event = self._stream.record_event()
        return _CudaMark(event)


def copy_seconds(device: torch.device) -> Callable[[int], float]:
    """Return a function from bytes to seconds of the bus from pinned memory, measured with one large copy."""
    nbytes = 64 << 20
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    times = []
    for _ in range(4):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    rate = nbytes / min(times)
    return lambda wanted: wanted / rate
