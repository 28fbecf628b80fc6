"""The archive of a grid: one folder with every point's config, logs and results, and a checkpoint.

The checkpoint is a file of events, appended and flushed to disk one line at a time, so that a kill at any
moment loses at most the line being written. A result counts when its summary is whole: it is written beside
and renamed, so a point that finished just before a kill is found finished. Used by `perf.runner`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import msgspec

from inlaid.files import write_atomically
from inlaid.report.provenance import git
from perf.instance import Instance

EventKind = Literal["started", "passed", "failed", "interrupted", "resumed", "forced"]


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    event: EventKind
    time: str
    point: str = ""
    attempt: int = 0
    seconds: float = 0.0
    reason: str = ""
    revision: str = ""


class ArchiveBusy(ValueError):
    """Another runner, or a process it left, still works on this archive."""


class Archive:
    """Owner of the folder, the lock on it and the checkpoint's end."""

    def __init__(self, home: Path) -> None:
        self.home = home
        if not (home / "points.json").is_file():
            raise ValueError(f"{home} is not an archive of experiments: it has no points.json")
        self.points: list[str] = msgspec.json.decode((home / "points.json").read_bytes(), type=list[str])
        self.lock = -1
        self.checkpoint = home / "checkpoint.jsonl"

    @contextlib.contextmanager
    def held(self, timeout_s: float = 40.0) -> Iterator[None]:
        """Lock the archive inside the `with` body; a killed runner releases it when its processes have ended."""
        self.acquire(timeout_s)
        try:
            yield
        finally:
            os.close(self.lock)

    def acquire(self, timeout_s: float = 40.0) -> None:
        """Wait until the processes of a killed runner have ended: their wardens hold the lock until then."""
        self.lock = os.open(self.home / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        end = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ArchiveBusy(f"{self.home} is in use by another runner (lock held)") from None
                time.sleep(0.1)
        self._drop_cut_line()

    def directory(self, point: str) -> Path:
        return self.home / "points" / point

    def instance(self, point: str) -> Instance:
        return msgspec.json.decode((self.directory(point) / "instance.json").read_bytes(), type=Instance)

    def append(self, event: EventKind, **fields: Any) -> None:
        """On disk when this returns."""
        line = msgspec.json.encode(Event(event, _now(), **fields)) + b"\n"
        with self.checkpoint.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> list[Event]:
        """Read the events since the last `--force`."""
        if not self.checkpoint.exists():
            return []
        whole = self.checkpoint.read_bytes().splitlines(keepends=True)
        events = [msgspec.json.decode(line, type=Event) for line in whole if line.endswith(b"\n")]
        forced = max((i for i, event in enumerate(events) if event.event == "forced"), default=-1)
        return events[forced + 1 :]

    def passed(self) -> dict[str, int]:
        """Map each point that passed to the attempt whose result counts."""
        return {event.point: event.attempt for event in self.events() if event.event == "passed"}

    def unfinished(self) -> list[Event]:
        """List attempts that were started and have no end: the runner died during them."""
        open_attempts: dict[tuple[str, int], Event] = {}
        for event in self.events():
            if event.event == "started":
                open_attempts[event.point, event.attempt] = event
            else:
                open_attempts.pop((event.point, event.attempt), None)
        return list(open_attempts.values())

    def new_attempt(self, point: str) -> tuple[int, Path]:
        """Make the next attempt: its number and its empty folder."""
        taken = [int(path.name.removeprefix("attempt-")) for path in self.directory(point).glob("attempt-*")]
        number = max(taken, default=0) + 1
        directory = self.directory(point) / f"attempt-{number}"
        directory.mkdir()
        return number, directory

    def attempt_directory(self, point: str, attempt: int) -> Path:
        return self.directory(point) / f"attempt-{attempt}"

    def _drop_cut_line(self) -> None:
        if self.checkpoint.exists():
            data = self.checkpoint.read_bytes()
            if data and not data.endswith(b"\n"):
                write_atomically(self.checkpoint, data[: data.rfind(b"\n") + 1])


def create_archive(log_home: Path, name: str, templates: list[Path], instances: list[Instance]) -> Archive:
    """Write everything that is known before the first run; the folder appears whole or not at all."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    log_home.mkdir(parents=True, exist_ok=True)
    home = _fresh(log_home / f"{stamp}_{name}")
    partial = home.with_name(f".{home.name}.partial-{os.getpid()}")
    partial.mkdir()
    (partial / "templates").mkdir()
    for number, template in enumerate(templates):
        (partial / "templates" / f"{number}-{template.name}").write_bytes(template.read_bytes())
    for instance in instances:
        directory = partial / "points" / instance.point
        directory.mkdir(parents=True)
        instance.write(directory)
    _write_git(partial)
    points = msgspec.json.encode([instance.point for instance in instances])
    (partial / "points.json").write_bytes(msgspec.json.format(points, indent=1) + b"\n")
    partial.rename(home)
    return Archive(home)


def _fresh(home: Path) -> Path:
    """Two grids of one second get different folders."""
    candidate, number = home, 1
    while candidate.exists():
        number += 1
        candidate = home.with_name(f"{home.name}-{number}")
    return candidate


def git_revision() -> str:
    return git("rev-parse", "HEAD") or "unknown"


def _write_git(directory: Path) -> None:
    (directory / "git-revision.txt").write_text(git_revision() + "\n")
    (directory / "git-diff.patch").write_text(git("diff", "--binary", "HEAD", strip=False))
    (directory / "git-untracked.txt").write_text(git("ls-files", "--others", "--exclude-standard", strip=False))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
