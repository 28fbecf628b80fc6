"""The lead of a tensor-parallel group: it starts the other members, tells them each step and each adapter, and notices
when one of them ends or hangs.

Everything that travels between members lies in memory without a name, which goes with the last of them. A step fails
for all members or for none; a member that ends or does not answer breaks the group, and the engine is started again.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Protocol

import numpy as np
import torch

from inlaid.adapters.adapter import AdapterEntry
from inlaid.config import EngineConfig
from inlaid.kernels import shared_group
from inlaid.kernels.group import GroupBroken
from inlaid.kernels.shared_group import SharedGroup
from inlaid.runner.eager_step import EagerStep, most_bytes
from inlaid.worker import group_messages as messages
from inlaid.worker import logs

log = logging.getLogger("inlaid.engine")

_TOLD = 2.0  # seconds until it is known how a member has ended
_GRACE = 3.0  # seconds that members have to end by themselves


class Follower(Protocol):
    """A member as its lead holds it. `ended` says that it has ended, and how, once it has."""

    ended: str | None

    def kill(self) -> None: ...

    def join(self, seconds: float) -> None:
        """Wait for its end, but no longer than that."""
        ...


StartMember = Callable[[int, int, socket.socket, int, int, Callable[[], None]], Follower]


class MemberProcess:
    """A member's process, and the thread that has started it and waits for its end."""

    def __init__(
        self, index: int, count: int, connection: socket.socket, steps: int, sums: int, on_end: Callable[[], None]
    ) -> None:
        """Start member `index` of `count` with its end of a socket and the descriptors of the shared memory; call
        `on_end`, on another thread, when it has ended."""
        self.ended: str | None = None
        self._index, self._on_end = index, on_end
        self._process: subprocess.Popen[bytes] | None = None
        started = threading.Event()
        descriptors = connection.fileno(), steps, sums
        threads = os.environ.get("OMP_NUM_THREADS") or str(threads_for(count))
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        environment.pop(logs.NAME, None)
        self._thread = threading.Thread(target=self._keep, args=(descriptors, environment, started), daemon=True)
        self._thread.start()
        started.wait()
        connection.close()
        if self._process is None:
            raise OSError(f"member {index} of the group could not be started: {self.ended}")

    def _keep(self, descriptors: tuple[int, ...], environment: dict[str, str], started: threading.Event) -> None:
        """Start the process and wait for its end, on one thread: the kernel ends it with the thread."""
        command = [sys.executable, "-m", "inlaid.worker.member", *map(str, (*descriptors, self._index))]
        try:
            self._process = subprocess.Popen(command, pass_fds=descriptors, env=environment)
        except OSError as error:
            self.ended = str(error)
            return
        finally:
            started.set()
        status = self._process.wait()
        how = f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
        self.ended = f"member {self._index} of the group has ended ({how})"
        self._on_end()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)


def threads_for(count: int) -> int:
    """Return the threads of a matmul in each of `count` processes, which leave a core to HTTP: threads of a matmul wait
    for each other in busy loops."""
    return max(1, (len(os.sched_getaffinity(0)) - 1) // count)


class Lead:
    """Member 0. It is the runner's `Members` and the adapter store's `Mirror`."""

    def __init__(self, config: EngineConfig, max_model_len: int, start: StartMember = MemberProcess) -> None:
        """Start the members, which load their shards from `config.model`, a folder."""
        self.count = config.tensor_parallel_size
        self.on_end: Callable[[], None] = lambda: None  # called on another thread when a member has ended
        self._fault: str | None = None
        self._closed = False
        self._number = 0  # of the step
        step_bytes = _step_bytes(config, max_model_len)
        self._seconds = config.tensor_parallel_timeout
        descriptors = (
            _memory("inlaid-steps", 2 * step_bytes + (self.count - 1) * messages.PIECE),
            _memory("inlaid-sums", shared_group.num_bytes(self.count)),
        )
        steps, sums = (mmap.mmap(each, os.fstat(each).st_size) for each in descriptors)
        whole = np.frombuffer(steps, np.uint8)
        self._slots = [whole[turn * step_bytes : (turn + 1) * step_bytes] for turn in range(2)]
        self._areas = torch.from_numpy(whole[2 * step_bytes :]).view(self.count - 1, messages.PIECE)
        self.group = SharedGroup(sums, 0, self.count, self._seconds, self._ended)
        self._sockets: list[socket.socket] = []
        self._members: list[Follower] = []
        self._finalizer = weakref.finalize(self, _close, self._sockets)
        noticed = weakref.WeakMethod(self._notice)
        try:
            for index in range(1, self.count):
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self._sockets.append(ours)
                self._members.append(start(index, self.count, theirs, *descriptors, lambda: _call(noticed())))
                begin = messages.Begin(config=config, index=index, count=self.count, step_bytes=step_bytes)
                ours.send(messages.encode(begin))
        except BaseException:
            self.close()
            raise
        finally:
            for each in descriptors:
                os.close(each)

    def fault(self) -> str | None:
        """Return why the group computes nothing any more, or None."""
        if self._fault is None and not self._closed:
            self._fault = self._ended()
        return self._fault

    def wait_until_loaded(self) -> None:
        """Wait until all members have loaded their shards. RuntimeError says what one of them lacks."""
        self._collect(None)

    def make_cache(self, num_blocks: int, shared_elements: int) -> None:
        """Let the members make KV pages like the lead's."""
        self._ask(messages.MakeCache(num_blocks=num_blocks, shared_elements=shared_elements))

    @contextmanager
    def step(self, step: EagerStep) -> Iterator[None]:
        """Let the members compute a step beside the body. If the body raises, none of them waits for the rest."""
        self._check()
        turn = (self._number + 1) % 2
        step.write(self._slots[turn])
        self._number += 1
        try:
            self._tell(messages.Compute(number=self._number, turn=turn))
            self.group.begin(self._number)
            yield
        except GroupBroken as error:
            self._break(str(error))
            raise
        except BaseException:
            self.group.fail()
            raise

    def upload(self, slot: int, entries: Sequence[AdapterEntry], starts: Sequence[int], flat: torch.Tensor) -> None:
        """Bring each member its part of an adapter; when all have it, show it on all."""
        self._check()
        size = entries[-1].end * flat.element_size()
        parts = flat.view(torch.uint8).view(self.count, size)[1:]
        for start in range(0, size, messages.PIECE):
            count = min(messages.PIECE, size - start)
            self._areas[:, :count] = parts[:, start : start + count]
            self._ask(messages.Take(size=size, start=start, count=count))
        self._ask(messages.Show(slot=slot, entries=tuple(entries), starts=tuple(starts)))

    def clear(self, slot: int) -> None:
        """Empty a slot on all members; one that has ended has nothing to empty."""
        with suppress(GroupBroken):
            self._tell(messages.Clear(slot=slot))

    def close(self) -> None:
        """End the members."""
        self._closed = True
        self._finalizer()
        for member in self._members:
            member.join(_GRACE)
            if member.ended is None:
                member.kill()
                member.join(_GRACE)

    def _notice(self) -> None:
        if not self._closed:
            self.on_end()

    def _ended(self) -> str | None:
        return next((member.ended for member in self._members if member.ended is not None), None)

    def _check(self) -> None:
        fault = self.fault()
        if fault is not None:
            raise GroupBroken(fault)

    def _break(self, reason: str) -> None:
        """Give the group up; a member that hangs would hold its memory."""
        self._fault = self._fault or reason
        log.error("the tensor-parallel group is given up: %s", reason)
        for member in self._members:
            member.kill()

    def _ask(self, command: messages.Command) -> None:
        """Tell all members something, and wait for their answers. RuntimeError: the first of those that failed."""
        self._tell(command)
        self._collect(self._seconds)

    def _tell(self, command: messages.Command) -> None:
        packet = messages.encode(command)
        for index, each in enumerate(self._sockets, 1):
            self._reach(index, each, self._seconds, partial(each.send, packet))

    def _collect(self, seconds: float | None) -> None:
        failures = []
        for index, each in enumerate(self._sockets, 1):
            data = self._reach(index, each, seconds, partial(each.recv, messages.PACKET))
            answer = messages.decode(data, messages.Answer)
            if isinstance(answer, messages.Failed):
                failures.append(f"member {index} of the group: {answer.message}")
        if failures:
            raise RuntimeError(failures[0])

    def _reach(self, index: int, to: socket.socket, seconds: float | None, act: Callable[[], int | bytes]) -> bytes:
        """Send or receive; a member that is not there, or does not answer, breaks the group."""
        try:
            to.settimeout(seconds)
            done = act()
            if done:
                return done if isinstance(done, bytes) else b""
            reason = f"member {index} of the group has ended"
        except TimeoutError:
            reason = f"member {index} of the group has not answered within {seconds:g} s"
        except OSError as error:
            reason = f"member {index} of the group cannot be reached ({error.strerror or error})"
        self._members[index - 1].join(_TOLD)  # how it has ended is known soon
        reason = self._members[index - 1].ended or reason
        self._break(reason)
        raise GroupBroken(reason)


def _close(sockets: list[socket.socket]) -> None:
    """Close the lead's ends, whereupon the members end."""
    for each in sockets:
        each.close()


def _call(method: Callable[[], None] | None) -> None:
    if method is not None:
        method()


def _step_bytes(config: EngineConfig, max_model_len: int) -> int:
    """Return the room for a step's inputs, in whole pages."""
    scheduler, guesses = config.scheduler, config.speculation.num_speculative_tokens
    tokens = scheduler.max_num_batched_tokens + scheduler.max_num_seqs * (1 + guesses)
    size = most_bytes(tokens, scheduler.max_num_seqs, -(-max_model_len // config.cache.block_size))
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _memory(name: str, size: int) -> int:
    """Return a descriptor of memory without a name, which is gone when no process has it open."""
    descriptor = os.memfd_create(name)
    os.ftruncate(descriptor, size)
    return descriptor
