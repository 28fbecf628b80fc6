"""Quantizing that is killed at a chosen point, in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inlaid.quant import publish
from inlaid.quant import quantize as rail
from inlaid.quant.quantize import add_task, quantize
from inlaid.quant.settings import Gate, Place, Settings, TaskSource
from tests import fork_server


def exit_code(function: Callable[..., None], *given: Any) -> int | None:
    """Return how a process that calls a function of this module has ended."""
    if (fork := fork_server.call(function, *given)) is not None:
        return fork.wait(240)
    process = multiprocessing.get_context("spawn").Process(target=function, args=given)
    process.start()
    process.join(240)
    return process.exitcode


def quantize_until(base: Path, out: Path, at: str, settings: str, tasks: list[str]) -> None:
    """Quantize, minimax-loss in as many rounds as it may take, three; die where progress says `at`."""
    rail.ENOUGH, rail.LOSS_ROUNDS = -1.0, 3

    def progress(step: str, done: int, total: int) -> None:
        if at in f"{step}, {done}":
            os.kill(os.getpid(), signal.SIGKILL)

    sources = [TaskSource.parse(task) for task in tasks]
    chosen = Settings.from_record(json.loads(settings))
    quantize(base, sources, chosen, out, Place(progress=progress), Gate(force=True))


def publish_until(out: Path, task: str, owner: str, name: str, when: str, at: int) -> None:
    """Add a task; die before or after the call number `at` of a function, once the new version is whole."""
    target: Any = publish if owner == "publish" else Path
    real, sync, calls = getattr(target, name), publish.sync_folder, [0]

    def killing(*args: Any, **more: Any) -> Any:
        calls[0] += 1
        if when == "before" and calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        made = real(*args, **more)
        if when == "after" and calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    def armed(*args: Any, **more: Any) -> Any:
        setattr(target, name, killing)
        return sync(*args, **more)

    whole: Any = killing if (owner, name) == ("publish", "sync_folder") else armed  # called when the new version is
    publish.sync_folder = whole
    add_task(out, TaskSource.parse(task), gate=Gate(force=True))
