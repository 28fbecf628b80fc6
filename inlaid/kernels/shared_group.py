"""A group of processes (or threads) of one machine that exchange tensors through shared memory.

Every member has a line of counters and two buffers. In an exchange each member copies its tensor into one of its
buffers, counts itself as arrived, waits for the others, and reads their buffers in the order of the members. The two
buffers take turns: a member that writes a buffer again knows by the exchange between that all have read it. A step
begins with an exchange of nothing, so that this also holds after a step that failed half way.

Counters and data are written in the order in which the others must see them, which x86 processors keep; `why_not`
refuses others. Members do not wait by a lock, as one that dies would keep it.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Callable

import numpy as np
import torch

from inlaid.kernels.group import GroupBroken, StepFailed

BUFFER = 1 << 22  # bytes; larger tensors are exchanged in pieces
_LINE = 8  # words: a cache line, so that members do not slow each other down
_ARRIVED, _FAILED, _WAITED = range(3)  # the exchange, the step that failed, nanoseconds spent waiting
_LOOKING = 0.00005  # seconds of waiting in which a member only looks
_YIELDING = 0.001  # seconds until which it gives the processor to others between looks; then it sleeps between them
_NAP = 0.0001  # seconds


def why_not() -> str | None:
    """Return None where shared memory does, else the reason."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"a {platform.machine()} processor may show another process two writes in another order"
    return None


def num_bytes(count: int) -> int:
    """Return the bytes of a group's memory, which takes pages only where it is written."""
    return count * (_LINE * 8 + 2 * BUFFER)


class SharedGroup:
    """One member of `count`. The memory is all zero at first."""

    def __init__(
        self,
        memory: mmap.mmap,
        index: int,
        count: int,
        seconds: float,
        gone: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`seconds`: the longest that this member waits for another. `gone` says which member has ended, if one has."""
        self.index, self.count = index, count
        self._seconds, self._gone = seconds, gone
        words = count * _LINE
        self._lines = np.frombuffer(memory, np.int64, words).reshape(count, _LINE)
        self._buffers = torch.frombuffer(memory, dtype=torch.uint8, offset=words * 8).view(count, 2, BUFFER)
        self._step = 0
        self._at = 0  # the exchange

    def begin(self, step: int) -> None:
        """Begin a step, whose number is above those of all before, as soon as all members do."""
        self._step, self._at = step, step << 24
        self._arrive()

    def fail(self) -> None:
        """Tell the members that this one cannot compute its part of the step."""
        self._lines[self.index, _FAILED] = self._step

    def waited(self) -> list[float]:
        """Return for each member the seconds that it has waited for others."""
        return [float(nanoseconds) / 1e9 for nanoseconds in self._lines[:, _WAITED]]

    def sum(self, x: torch.Tensor) -> None:
        """Replace x by the sum over the members, which is rounded once."""
        flat = x.view(-1)
        piece = BUFFER // x.element_size()
        for start in range(0, max(1, flat.numel()), piece):
            part = flat[start : start + piece]
            summands = self._exchange(part)
            total = summands[0].float()
            for summand in summands[1:]:
                total = total + summand  # of half precision: in single
            part.copy_(total)

    def gather(self, x_LN: torch.Tensor) -> torch.Tensor:
        """Return the members' columns side by side."""
        rows, columns = x_LN.shape
        out = x_LN.new_empty(rows, self.count, columns)
        size = max(1, BUFFER // (columns * x_LN.element_size()))
        for start in range(0, rows, size):
            part = x_LN[start : start + size].contiguous()
            for member, theirs in enumerate(self._exchange(part.view(-1))):
                out[start : start + size, member] = theirs.view(part.shape)
        return out.view(rows, self.count * columns)

    def _exchange(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return the members' tensors of this exchange, each in the memory of its member."""
        turn = (self._at + 1) & 1
        size = flat.numel() * flat.element_size()
        views = [buffer[turn, :size].view(flat.dtype) for buffer in self._buffers]
        views[self.index].copy_(flat)
        self._arrive()
        return views

    def _arrive(self) -> None:
        """Count this member as arrived, and wait for the others."""
        self._at += 1
        self._lines[self.index, _ARRIVED] = self._at
        began = time.perf_counter_ns()
        for member in range(self.count):
            if self._lines[member, _ARRIVED] < self._at:
                self._wait_for(member)
        self._lines[self.index, _WAITED] += time.perf_counter_ns() - began
        self._check_step()

    def _check_step(self) -> None:
        failed = self._lines[:, _FAILED] == self._step
        if failed.any():
            raise StepFailed(f"member {int(failed.argmax())} of the group could not compute its part")

    def _wait_for(self, member: int) -> None:
        """Wait for a member: looking at first, then giving the processor to others between looks, then asleep."""
        arrived, began = self._lines[:, _ARRIVED], time.monotonic()
        while arrived[member] < self._at:
            waited = time.monotonic() - began
            if waited < _LOOKING:
                continue
            self._check_step()
            if waited < _YIELDING:
                os.sched_yield()
                time.sleep(0)  # lets threads of this process run, too
                continue
            if (gone := self._gone()) is not None:
                raise GroupBroken(gone)
            if waited > self._seconds:
                raise GroupBroken(f"member {member} of the group has not answered within {self._seconds:g} s")
            time.sleep(_NAP)
