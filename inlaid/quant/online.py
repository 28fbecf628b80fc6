"""The process that quantizes beside a server: `python -m inlaid.quant.online ORDER.json`.

It carries out one order (see `online_jobs`) with the machinery of `inlaid task`, writes its progress beside the order,
and makes a new version without touching any other. It is polite: low priority, few threads, a bounded share of the
device's time, bounded memory. It ends with the server. Started again after a kill, it goes on where it was.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from inlaid.checkpoint import Checkpoint
from inlaid.model.spec import ModelSpec, read_spec
from inlaid.quant.gate import HELD
from inlaid.quant.online_jobs import Memory, Order, Report, read_order, write_report
from inlaid.quant.pace import Pace
from inlaid.quant.quantize import Into, add_task, remove_task
from inlaid.quant.record import Record
from inlaid.quant.settings import DTYPES, Gate, Place, QuantizeError, Shortcuts, TaskSource

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_BETWEEN_REPORTS = 0.25  # seconds
_SOLVING_COPIES = 8  # matrices of the largest Hessian's size, in its double-precision factorization and its inverse


class Reporter:
    """Writer of the progress file."""

    def __init__(self, order_file: Path, memory: Memory, before: dict[str, float]) -> None:
        self.report = Report(memory=memory, before=before)
        self._file = order_file
        self._seconds: Mapping[str, float] = {}
        self._written = 0.0

    def watch(self, seconds: Mapping[str, float]) -> None:
        """Report these seconds from now on, as they grow."""
        self._seconds = seconds

    def progress(self, stage: str, done: int, total: int) -> None:
        """Report a stage, unless the last report is young."""
        self.report.stage, self.report.done, self.report.total = stage, done, total
        if time.monotonic() - self._written > _BETWEEN_REPORTS:
            self.write()

    def write(self) -> None:
        self.report.seconds = {part: round(spent, 3) for part, spent in sorted(self._seconds.items())}
        self.report.memory.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.report.memory.gpu_expected:
            self.report.memory.gpu_peak = torch.cuda.max_memory_allocated()
        write_report(self._file, self.report)
        self._written = time.monotonic()


def run(order_file: Path) -> int:
    """Carry out an order, and return the exit status: 0 when its report holds an outcome."""
    order = read_order(order_file)
    record = Record.read(Path(order.source))
    before = {name: float(task["loss_quantized"]) for name, task in record.tasks.items()}
    reporter = Reporter(order_file, expected_memory(order, record), before)
    try:
        bound_memory(order, reporter.report.memory)
        reporter.write()
        base_version = _carry_out(order, reporter)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        refused = isinstance(error, ValueError) and (Path(order.folder) / "inlaid.json").is_file()
        reporter.report.outcome = "refused" if refused else "failed"
        reporter.report.why = _sentence(error)
        base_version = Checkpoint(order.folder).fingerprint() if refused else ""
    else:
        reporter.report.outcome = "ready"
    if base_version:
        made = Record.read(Path(order.folder))
        reporter.report.after = {name: float(task["loss_quantized"]) for name, task in made.tasks.items()}
    reporter.report.base_version = base_version
    reporter.write()
    return 0


def _carry_out(order: Order, reporter: Reporter) -> str:
    """Make the version, and return the hash of its files."""
    pace = Pace(order.share, torch.device(order.device))
    place = Place(order.device, progress=reporter.progress, rest=pace, watch=reporter.watch)
    gate = Gate(order.tolerance, order.force, keep=True)
    into = Into(Path(order.folder), Path(order.bank), frozenset(order.keep))
    shortcuts = Shortcuts(order.solve, order.check, order.threshold)
    if not (into.folder / "inlaid.json").is_file():  # else a kill came between the end of the job and its report
        if order.verb == "add":
            source = TaskSource(order.name, Path(order.adapter), Path(order.data))
            add_task(Path(order.source), source, place, gate, into, shortcuts)
        else:
            remove_task(Path(order.source), order.name, place, gate, into, shortcuts)
    return Checkpoint(into.folder).fingerprint()


def expected_memory(order: Order, record: Record) -> Memory:
    """Return the most that a job holds: one block's weights, its Hessians and their factorization, hidden states of the
    new task or of those being checked, embedding and head, and what torch itself takes.
    """
    spec, width = read_spec(record.base_path), DTYPES[record.settings.dtype].itemsize
    on_gpu = order.device != "cpu"
    largest = max(spec.intermediate_size, spec.hidden_size, spec.num_heads * spec.head_dim)
    block = _block_elements(spec) * width
    hessians = 4 * (3 * spec.hidden_size**2 + spec.intermediate_size**2)
    solving = 8 * _SOLVING_COPIES * largest**2
    tokens = max(record.settings.calibration.max_tokens, HELD)
    states = 3 * width * spec.hidden_size * tokens
    ends = 2 * spec.vocab_size * spec.hidden_size * width
    work = 2 * block + hessians + solving + states + ends
    base = 700 << 20  # the interpreter with torch and transformers
    return Memory(
        expected=base + (ends if on_gpu else work),
        limit=int(order.memory_gib * 2**30),
        gpu_expected=work if on_gpu else 0,
        gpu_limit=int(order.gpu_memory_gib * 2**30) if on_gpu else 0,
    )


def _block_elements(spec: ModelSpec) -> int:
    heads = 2 * spec.num_heads + 2 * spec.num_kv_heads
    return spec.hidden_size * spec.head_dim * heads + 3 * spec.hidden_size * spec.intermediate_size


def bound_memory(order: Order, memory: Memory) -> None:
    """Refuse a job that needs more than it may have, and let the system refuse what was not foreseen."""
    for what, need, limit, flag in (
        ("host", memory.expected, memory.limit, "--task-memory-gib"),
        ("GPU", memory.gpu_expected, memory.gpu_limit, "--task-gpu-memory-gib"),
    ):
        if limit and need > limit:
            raise QuantizeError(
                f"the job may need {need / 2**30:.2f} GiB of {what} memory, and may take {limit / 2**30:.2f} ({flag}); "
                "raise that, or quantize with fewer calibration tokens"
            )
    if memory.limit:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (memory.limit, hard))
    if memory.gpu_limit:
        index = torch.device(order.device).index or 0
        whole = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory.gpu_limit / whole), index)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error}: the disk is full; free some space and ask for the task again, the job goes on where it was"
    if isinstance(error, MemoryError) or "allocate" in str(error) or "out of memory" in str(error):
        first = str(error).partition("\n")[0]
        return f"the job's memory was not enough ({first}); raise --task-memory-gib or --task-gpu-memory-gib"
    return str(error) or repr(error)


def _be_polite(order: Order) -> None:
    """Take a low priority and few threads, and end with the server. The priority is that whose part of a busy core is
    the job's share (each step of niceness is worth a factor of 1.25), so that the job goes on under full load.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)  # the server has ended meanwhile
    os.nice(min(19, round(-math.log(order.share) / math.log(1.25))))
    torch.set_num_threads(order.threads)


def main() -> int:
    """Run the order that the command line names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides
    file = Path(sys.argv[1])
    _be_polite(read_order(file))
    return run(file)


if __name__ == "__main__":
    sys.exit(main())
