"""The files by which a server and its quantizing process speak: what to do, how far it is, and how it ended.

    BANK/jobs/NAME.json             the order: written by the server, read by the process
    BANK/jobs/NAME.progress.json    the report: written by the process, read by the server

Both are replaced atomically, so either side may be killed at any moment. Nothing here needs torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

from inlaid.files import write_atomically

NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")

State = Literal["queued", "running", "ready", "switching", "serving", "refused", "failed", "cancelled"]


class Order(msgspec.Struct, kw_only=True):
    """One job: a task that is added to a base or removed from it, and what became of it."""

    name: str
    verb: Literal["add", "remove"]
    number: int  # of the version that it makes
    parent: int
    source: str  # folder of the parent
    folder: str  # of the version that it makes
    bank: str
    keep: list[str] = []  # entries of the bank that other versions need
    adapter: str = "none"
    data: str = ""
    solve: str = "exact"
    check: str = "exact"
    threshold: float = 0.01
    tolerance: float = 0.02
    force: bool = False
    switch: bool = True  # switch to it when it is ready
    device: str = "cpu"
    share: float = 0.1
    threads: int = 1
    memory_gib: float = 0.0
    gpu_memory_gib: float = 0.0
    state: State = "queued"
    why: str | None = None  # it was refused, failed or cancelled
    created: float = 0.0
    attempts: int = 0  # in a row that ended without a report


class Memory(msgspec.Struct, kw_only=True):
    """Bytes: what the job will need at most, told before it begins; what it may take (0: anything); what it took."""

    expected: int = 0
    limit: int = 0
    peak: int = 0
    gpu_expected: int = 0
    gpu_limit: int = 0
    gpu_peak: int = 0


class Report(msgspec.Struct, kw_only=True):
    """The progress of a job, and at its end the outcome."""

    stage: str = "starting"
    done: int = 0
    total: int = 0
    seconds: dict[str, float] = {}  # by part
    memory: Memory = msgspec.field(default_factory=Memory)
    before: dict[str, float] = {}  # losses, in nats a token, of every task
    after: dict[str, float] = {}
    outcome: Literal["", "ready", "refused", "failed"] = ""
    why: str | None = None
    base_version: str = ""


class Jobs:
    """The orders and reports below one bank."""

    def __init__(self, bank: Path) -> None:
        self.folder = bank / "jobs"

    def orders(self) -> dict[str, Order]:
        """Return all orders by name, oldest first."""
        found = []
        for file in sorted(self.folder.glob("*.json")):
            if not file.name.endswith(".progress.json"):
                found.append(read_order(file))
        return {order.name: order for order in sorted(found, key=lambda order: order.created)}

    def file(self, name: str) -> Path:
        """Return the file of an order."""
        return self.folder / f"{name}.json"

    def save(self, order: Order) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file(order.name), msgspec.json.format(msgspec.json.encode(order), indent=1))

    def forget(self, name: str) -> None:
        """Remove an order and its report."""
        for file in (self.file(name), report_file(self.file(name))):
            file.unlink(missing_ok=True)

    def begin(self, name: str) -> None:
        """Drop the report of an earlier attempt."""
        report_file(self.file(name)).unlink(missing_ok=True)

    def report(self, name: str) -> Report:
        """Return how far a job is."""
        try:
            return msgspec.json.decode(report_file(self.file(name)).read_bytes(), type=Report)
        except FileNotFoundError:
            return Report()
        except (OSError, msgspec.MsgspecError) as error:
            return Report(stage=f"its report cannot be read: {error}")

    def write_data(self, name: str, data: bytes) -> Path:
        """Keep examples that came with a request, and return their file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}.jsonl"
        write_atomically(file, data)
        return file


def read_order(file: Path) -> Order:
    """Read an order. ValueError: it cannot be used."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Order)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{file} cannot be used: {error}; remove it, and ask for the task again") from error


def report_file(order_file: Path) -> Path:
    return order_file.with_name(order_file.name.removesuffix(".json") + ".progress.json")


def write_report(order_file: Path, report: Report) -> None:
    write_atomically(report_file(order_file), msgspec.json.encode(report))
