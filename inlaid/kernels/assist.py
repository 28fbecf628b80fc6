"""The CPU's part in a step whose adapters have not all landed: y += scale * (x A^T) B^T for some rows, from host
memory. Rows are cut into shares for worker threads, which torch's matmul lets run side by side; x travels to the host
and the result back over a ferry. `kernels/arriving.py` says which rows and when; `measure` says how many rows one
worker should get: as many as it computes in the time in which the device would have been sent the weights.

Shapes: M rows, K inputs, N outputs, R rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Protocol

import torch

FEWEST_ROWS = 8  # for one worker: with fewer, handing them over costs more than computing them
_SPARE_CORES = 2  # for the step loop and for HTTP


@dataclass(frozen=True)
class Factors:
    """An adapter's matrices at one linear, in host memory."""

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Profile:
    """The division of the work among threads. No workers: the step's own thread does it."""

    workers: int = 0
    rows_per_worker: int = FEWEST_ROWS

    def shares(self, rows: int) -> int:
        """Return into how many pieces this number of rows is cut."""
        return max(1, min(self.workers, -(-rows // self.rows_per_worker)))


class Ferry(Protocol):
    """The way between the device and memory that threads can read."""

    def fetch(self, x_MK: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        """Return the same rows on the host, and what to call before reading them."""
        ...

    def room(self, rows: int, columns: int) -> torch.Tensor:
        """Return host memory for a result."""
        ...

    def bring(self, delta_MN: torch.Tensor) -> torch.Tensor:
        """Return a result from `room` on the device."""
        ...

    def turn(self) -> None:
        """Take back the memory of all that was fetched and brought."""
        ...


class NoFerry:
    """The ferry of a model that runs in host memory anyway."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def fetch(self, x_MK: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        return x_MK, _nothing

    def room(self, rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=self._dtype)

    def bring(self, delta_MN: torch.Tensor) -> torch.Tensor:
        return delta_MN

    def turn(self) -> None: ...


class CudaFerry:
    """Pinned buffers and a stream. x is fetched beside the base weights' product. A buffer is used again at the next
    linear: by then the workers have read it, and whatever writes it anew waits for what the device still sends."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rows: int, most_in: int, most_out: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._inputs = torch.empty(rows * most_in, dtype=dtype, pin_memory=True)
        self._outputs = torch.empty(rows * most_out, dtype=dtype, pin_memory=True)
        self._num_in = self._num_out = 0

    def fetch(self, x_MK: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        host_MK = self._inputs[self._num_in : self._num_in + x_MK.numel()].view(x_MK.shape)
        self._num_in += x_MK.numel()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host_MK.copy_(x_MK, non_blocking=True)
        return host_MK, self._stream.record_event().synchronize

    def room(self, rows: int, columns: int) -> torch.Tensor:
        begin, self._num_out = self._num_out, self._num_out + rows * columns
        return self._outputs[begin : self._num_out].view(rows, columns)

    def bring(self, delta_MN: torch.Tensor) -> torch.Tensor:
        return delta_MN.to(self._device, non_blocking=True)

    def turn(self) -> None:
        self._num_in = self._num_out = 0


@dataclass(frozen=True)
class Job:
    """One adapter's contribution to a range of rows [begin, end), being computed."""

    begin: int
    end: int
    delta_MN: torch.Tensor
    shares: list[Future[None]]


class Assistant:
    """Starts jobs and adds their results."""

    def __init__(self, ferry: Ferry, profile: Profile) -> None:
        self.profile = profile
        self.ferry = ferry
        self._threads = ThreadPoolExecutor(profile.workers, "adapter-assist", _alone) if profile.workers else None

    def start(self, x_TK: torch.Tensor, begin: int, end: int, siblings: Sequence[tuple[int, Factors | None]]) -> Job:
        """Start rows [begin, end) of x through the factors of each sibling, given with its width."""
        rows = end - begin
        x_MK, there = self.ferry.fetch(x_TK[begin:end])
        delta_MN = self.ferry.room(rows, sum(width for width, _ in siblings))
        if self._threads is None:
            there()
            _compute(x_MK, delta_MN, siblings)
            return Job(begin, end, delta_MN, [])
        count = self.profile.shares(rows)
        bounds = [rows * share // count for share in range(count + 1)]
        shares = [
            self._threads.submit(_share, there, x_MK[first:last], delta_MN[first:last], siblings)
            for first, last in pairwise(bounds)
        ]
        return Job(begin, end, delta_MN, shares)

    def add(self, jobs: Sequence[Job], out_TN: torch.Tensor) -> None:
        """Wait for the workers and add what they made."""
        for job in jobs:
            for share in job.shares:
                share.result()
            out_TN[job.begin : job.end] += self.ferry.bring(job.delta_MN)
        self.ferry.turn()


def _share(
    there: Callable[[], None],
    x_MK: torch.Tensor,
    delta_MN: torch.Tensor,
    siblings: Sequence[tuple[int, Factors | None]],
) -> None:
    with torch.inference_mode():
        there()
        _compute(x_MK, delta_MN, siblings)


def _compute(x_MK: torch.Tensor, delta_MN: torch.Tensor, siblings: Sequence[tuple[int, Factors | None]]) -> None:
    """Write the siblings' products side by side, computed in fp32: a CPU is no faster in half precision, and the inner
    product may exceed its range."""
    x_MK, column = x_MK.float(), 0
    for width, factors in siblings:
        target = delta_MN[:, column : column + width]
        if factors is None:
            target.zero_()
        else:
            inner_MR = x_MK @ factors.a_RK.float().t()
            target.copy_(inner_MR @ factors.b_NR.float().t() * factors.scale)
        column += width


def _nothing() -> None: ...


def _alone() -> None:
    """Let a worker's matmuls run on its own core."""
    torch.set_num_threads(1)


def measure(
    width: int, workers: int = 0, copy_seconds: Callable[[int], float] | None = None, rank: int = 16
) -> Profile:
    """Time one worker's product at a square linear of this width, against sending the device the same matrices.
    `copy_seconds(nbytes)` is measured there; without it the fewest rows do. `workers` 0: all cores but two."""
    cores = workers or max(1, len(os.sched_getaffinity(0)) - _SPARE_CORES)
    if copy_seconds is None:
        return Profile(cores)
    rows = 32
    a_RK, b_NR = torch.ones(rank, width), torch.ones(width, rank)
    x_MK, delta_MN = torch.ones(rows, width), torch.empty(rows, width)
    with ThreadPoolExecutor(1, "adapter-profile", _alone) as thread:
        times = [thread.submit(_timed, x_MK, delta_MN, Factors(a_RK, b_NR, 1.0)).result() for _ in range(5)]
    sending = copy_seconds(2 * rank * width * 2)  # A and B in 16 bits
    return Profile(cores, max(FEWEST_ROWS, int(sending / (median(times) / rows))))


def _timed(x_MK: torch.Tensor, delta_MN: torch.Tensor, factors: Factors) -> float:
    begin = time.perf_counter()
    _compute(x_MK, delta_MN, [(delta_MN.shape[1], factors)])
    return time.perf_counter() - begin


def cuda_copy_seconds(device: torch.device) -> Callable[[int], float]:
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
