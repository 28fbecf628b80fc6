"""A member of a tensor-parallel group other than the lead: `python -m inlaid.worker.member SOCKET STEPS SUMS INDEX`,
where the first three are descriptors. It loads its shard and computes the steps that the lead tells it, until the
lead's end of the socket closes.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from inlaid.adapters.tables import clear, copies, empty_pages, show
from inlaid.checkpoint import Checkpoint
from inlaid.config import EngineConfig
from inlaid.kernels.backend import AdapterPages
from inlaid.kernels.group import GroupBroken, StepFailed
from inlaid.kernels.shared_group import SharedGroup
from inlaid.model.kv import KVLayout
from inlaid.model.shard import Shard
from inlaid.model.spec import ModelSpec, read_spec
from inlaid.model.transformer import Transformer
from inlaid.model.weights import compute_dtype, load
from inlaid.runner.eager_step import EagerStep
from inlaid.runner.following import FollowingRunner
from inlaid.worker import group_messages as messages
from inlaid.worker import lifetime, logs, trim
from inlaid.worker.loading import choose_device, choose_kernels, choose_max_len, pool_elements

log = logging.getLogger("inlaid.engine")


@dataclass
class _Loaded:
    """A shard in memory. `runner` comes with the KV pages."""

    config: EngineConfig
    spec: ModelSpec  # of the shard
    model: Transformer
    pages: AdapterPages
    dtype: torch.dtype
    runner: FollowingRunner | None = None


class Member:
    """The loop. `steps` and `sums` are the shared memory of steps and adapters, and that of the group's exchanges."""

    def __init__(self, connection: socket.socket, steps: mmap.mmap, sums: mmap.mmap) -> None:
        self._socket = connection
        self._steps = np.frombuffer(steps, np.uint8)
        self._sums = sums
        self._adapter = torch.empty(0, dtype=torch.uint8)  # the one that is being taken

    def run(self) -> int:
        """Follow the lead until it closes its end, and return the exit status."""
        while data := self._receive():
            try:
                self._obey(messages.decode(data, messages.Command))
            except GroupBroken as error:
                log.error("%s", error)
                return 1
        return 0

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(messages.PACKET)
        except OSError:
            return b""

    def _obey(self, command: messages.Command) -> None:
        if isinstance(command, messages.Compute):
            self._compute(command)
        elif isinstance(command, messages.Clear):
            clear(self._loaded.pages, command.slot)
        else:
            self._socket.send(messages.encode(self._answer(command)))

    def _answer(self, command: messages.Command) -> messages.Answer:
        try:
            match command:
                case messages.Begin():
                    self._load(command)
                case messages.MakeCache():
                    self._make_cache(command)
                case messages.Take():
                    self._take(command)
                case messages.Show():
                    self._show(command)
                case _:
                    raise AssertionError(f"{command!r} has no answer")
        except Exception as error:
            expected = isinstance(error, (ValueError, OSError, MemoryError)) and str(error)
            if not expected:
                log.error("%s failed", type(command).__name__, exc_info=error)
            return messages.Failed(message=str(error) if expected else repr(error))
        return messages.Done()

    def _compute(self, command: messages.Compute) -> None:
        first = command.turn * self._begin.step_bytes
        step = EagerStep.read(self._steps[first : first + self._begin.step_bytes])
        runner = self._loaded.runner
        assert runner is not None, "a cache is made first"
        try:
            self._group.begin(command.number)
            runner.run(step)
        except StepFailed as error:
            log.warning("step %d was left: %s", command.number, error)
        except GroupBroken:
            raise
        except Exception as error:
            log.error("step %d failed", command.number, exc_info=error)
            self._group.fail()

    def _load(self, command: messages.Begin) -> None:
        config, adapters = command.config, command.config.adapters
        self._begin = command
        self._group = SharedGroup(self._sums, command.index, command.count, math.inf, self._gone)
        device = choose_device(config.device)
        folder = Path(config.model)
        whole = read_spec(folder)
        spec = Shard(command.index, command.count).spec(whole)
        dtype = compute_dtype(config.dtype, whole, device)
        elements = 0 if config.cache.unified_memory else pool_elements(adapters, spec, dtype, False)
        pages = empty_pages(spec, adapters.max_loras + 1, elements, device, dtype)
        kernels = choose_kernels(config, device, pages, spec)
        longest = choose_max_len(config.max_model_len, whole)
        model = load(Checkpoint(folder), whole, kernels, device, dtype, longest, False, self._group)
        self._loaded = _Loaded(config, spec, model, pages, dtype)

    def _gone(self) -> str | None:
        return "the group's lead has ended" if lifetime.has_closed(self._socket) else None

    def _make_cache(self, command: messages.MakeCache) -> None:
        loaded = self._loaded
        device = choose_device(loaded.config.device)
        layout = KVLayout.of(loaded.spec, loaded.config.cache, loaded.dtype)
        if command.shared_elements:
            with torch.inference_mode(False):
                memory = torch.zeros(command.shared_elements, dtype=loaded.dtype, device=device)
            loaded.pages.pool = memory
            cache = layout.shared_pages(memory, command.shared_elements // layout.shared_elements)
        else:
            cache = layout.pages(command.num_blocks, device)
        loaded.runner = FollowingRunner(loaded.model, cache, layout.block_size, device, loaded.dtype)

    def _take(self, command: messages.Take) -> None:
        if not command.start:
            self._adapter = torch.empty(command.size, dtype=torch.uint8)
        first = 2 * self._begin.step_bytes + (self._begin.index - 1) * messages.PIECE
        piece = torch.from_numpy(self._steps[first : first + command.count])
        self._adapter[command.start : command.start + command.count] = piece

    def _show(self, command: messages.Show) -> None:
        pages, layers = self._loaded.pages, self._loaded.spec.num_layers
        flat = self._adapter.view(pages.pool.dtype)
        for target, source in copies(pages.pool, command.entries, command.starts, flat, 1, layers)[0]:
            target.copy_(source)
        show(pages, command.slot, command.entries, command.starts)


def main() -> int:
    """Follow the lead that has passed the descriptors on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the lead decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection, *memory = (int(each) for each in sys.argv[1:4])
    logs.configure_child(f"member {sys.argv[4]}")
    lifetime.end_with_parent()
    trim.keep_giving_back()
    steps, sums = (mmap.mmap(each, os.fstat(each).st_size) for each in memory)
    with socket.socket(fileno=connection) as to_lead:
        lifetime.end_with(to_lead)
        return Member(to_lead, steps, sums).run()


if __name__ == "__main__":
    sys.exit(main())
