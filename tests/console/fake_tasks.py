"""Tasks of the fake server: its orders, versions and routes are real, over a process that ends when a file says so, and
bases without weights.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlaid.quant.online_jobs import Report, read_order, write_report
from tests.server.live import DEMO

GO = "go"  # a file beside the orders: the process ends well once it is there
LOSSES = {"code": 0.7, "to_velar": 0.5}


def quantized(folder: Path, tasks: Mapping[str, float]) -> Path:
    """Make a folder like those that `inlaid quantize` writes, of the demo's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (DEMO / "base").iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    record = {name: {"loss_full": loss, "loss_quantized": loss, "bank_key": name} for name, loss in tasks.items()}
    (folder / "inlaid.json").write_text(json.dumps({"settings": {}, "tasks": record}))
    return folder


async def run_process(order_file: Path, environment: Mapping[str, str]) -> int:
    """Report a half-done job until it may end."""
    order = read_order(order_file)
    write_report(order_file, Report(stage="calibration", done=1, total=4, before=LOSSES))
    while not (order_file.parent / GO).exists():
        await asyncio.sleep(0.05)
    after = {**LOSSES, order.name: 0.25}
    quantized(Path(order.folder), after)
    version = f"version-{order.number}"
    write_report(
        order_file,
        Report(stage="done", done=4, total=4, before=LOSSES, after=after, outcome="ready", base_version=version),
    )
    return 0


@dataclass
class Staged:
    """A base without weights. That of an engine imports torch."""

    folder: Path
    version: str
    where: str = "device"
    seconds: float = 0.0


class Bases:
    """The bases of an engine that computes nothing."""

    version = "fake"

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def stage(self, folder: str, version: str, where: str, adapters: Mapping[str, str], rest: float) -> Staged:
        return Staged(Path(folder), version)

    def check_free(self) -> None: ...

    def exchange(self, staged: Staged) -> None: ...

    def enter(self, staged: Staged) -> None:
        self.version = staged.version

    def both(self, old: None, staying: frozenset[str]) -> Any:
        return self._runner
