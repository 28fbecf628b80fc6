"""The versions of a base that a server has served or may serve: a list beside the bank, of which one is current.

    BANK/versions/versions.json     the list, replaced atomically; its only writer is the server
    BANK/versions/0003              a version that a job has made, a folder like any that `inlaid quantize` writes

Version 0 is the folder that the server was started with. A version enters the list when its folder is whole and its
hash is known, so a half-written one is never served. The list needs no torch: the server process reads it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from inlaid.files import write_atomically

LIST = "versions.json"
FORMAT = 1


class VersionError(ValueError):
    """The list of versions cannot be used; the message says why and what to do."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One version of the base. `parent` is the version that it was made from, to which a rollback returns."""

    number: int
    folder: str
    base_version: str
    tasks: tuple[str, ...]
    parent: int | None = None
    refused: str | None = None  # why the gate refuses it; None: it may be served
    created: str = ""


class _List(msgspec.Struct, kw_only=True):
    format: int
    current: int
    next: int
    versions: list[Version]


class Versions:
    """The list of one bank."""

    def __init__(self, bank: Path, first: Path) -> None:
        """Read the list, or begin one with the folder `first`."""
        self.folder = bank / "versions"
        self._file = self.folder / LIST
        self._lock = _locked(self.folder)
        try:
            self._list = self._opened(first.resolve())
        except BaseException:
            self.close()
            raise

    def _opened(self, first: Path) -> _List:
        if not self._file.exists():
            zero = Version(number=0, folder=str(first), base_version="", tasks=tasks_of(first), created=_now())
            return _List(format=FORMAT, current=0, next=1, versions=[zero])
        found = _read(self._file)
        if Path(found.versions[0].folder) != first:
            raise VersionError(
                f"{self._file} lists versions of {found.versions[0].folder}, not of {first}: start the server "
                "with that folder, or give another --online-tasks folder"
            )
        return found

    def close(self) -> None:
        """Let another server use the bank."""
        os.close(self._lock)

    @property
    def current(self) -> Version:
        return self[self._list.current]

    @property
    def listed(self) -> tuple[Version, ...]:
        """All versions that are kept, oldest first."""
        return tuple(self._list.versions)

    def __getitem__(self, number: int) -> Version:
        found = next((version for version in self._list.versions if version.number == number), None)
        if found is None:
            known = ", ".join(str(version.number) for version in self._list.versions)
            raise VersionError(f"there is no version {number}; kept are {known}")
        return found

    def check_served(self, base_version: str) -> None:
        """Record the hash of version 0 when it is served first; refuse files that have changed since."""
        current = self.current
        if not current.base_version:
            self._replace(msgspec.structs.replace(current, base_version=base_version))
        elif current.base_version != base_version:
            raise VersionError(
                f"{current.folder} is not version {current.number} of the base any more: its files have changed (it "
                f"was {current.base_version[:12]}, it is {base_version[:12]}); put them back, or remove {self._file} "
                "to begin anew with the folder as it is"
            )

    def reserve(self) -> int:
        """Return the number of the next version, which no other will have."""
        self._list.next += 1
        self._save()
        return self._list.next - 1

    def folder_of(self, number: int) -> Path:
        """Return the folder that a version of this number is written to."""
        return self.folder / f"{number:04d}"

    def add(self, version: Version) -> None:
        """Enter a version whose folder is whole."""
        self._list.versions = [each for each in self._list.versions if each.number != version.number]
        self._list.versions.append(msgspec.structs.replace(version, created=version.created or _now()))
        self._save()

    def switch_to(self, number: int) -> None:
        """Make a version the current one."""
        assert self[number].refused is None, "the gate has refused it"
        self._list.current = number
        self._save()

    def before(self) -> Version:
        """Return the version that a rollback returns to."""
        parent = self.current.parent
        if parent is None:
            raise VersionError("version 0 is served, the base that the server was started with; there is none before")
        return self[parent]

    def clean(self, keep: int, needed: set[int]) -> list[int]:
        """Remove the oldest versions beyond `keep` from list and disk, but never version 0, the current one, the one
        before it, or those `needed`. Returns their numbers.
        """
        current = self.current
        safe = {0, current.number, current.parent, *needed}
        loose = [version for version in self._list.versions if version.number not in safe]
        gone = loose[: max(0, len(self._list.versions) - keep)]
        numbers = [version.number for version in gone]
        if numbers:
            self._list.versions = [each for each in self._list.versions if each.number not in numbers]
            self._save()  # before the folders go: what is listed is whole
        self._remove_unlisted(needed)
        return numbers

    def _remove_unlisted(self, needed: set[int]) -> None:
        """Remove finished folders that nothing lists or is still making."""
        kept = {self.folder_of(number) for number in {version.number for version in self._list.versions} | needed}
        for folder in sorted(self.folder.glob("[0-9][0-9][0-9][0-9]")):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _replace(self, version: Version) -> None:
        self._list.versions = [version if each.number == version.number else each for each in self._list.versions]
        self._save()

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file, msgspec.json.format(msgspec.json.encode(self._list), indent=1))


def tasks_of(folder: Path) -> tuple[str, ...]:
    """Return the names of the tasks that a quantized folder was made for."""
    try:
        return tuple(sorted(json.loads((folder / "inlaid.json").read_text())["tasks"]))
    except FileNotFoundError as error:
        raise VersionError(
            f"{folder} has no inlaid.json: tasks can be added to folders made by `inlaid quantize` only"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VersionError(f"{folder / 'inlaid.json'} cannot be used: {error}; quantize again") from error


def losses_of(folder: Path) -> dict[str, float]:
    """Return each task's loss on a quantized folder, in nats a token, as the job that wrote it measured them."""
    try:
        tasks = json.loads((folder / "inlaid.json").read_text())["tasks"]
        return {name: float(task["loss_quantized"]) for name, task in sorted(tasks.items())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def bank_keys_of(folder: Path) -> set[str]:
    """Return the bank's entries that a folder's tasks need."""
    try:
        return {str(task["bank_key"]) for task in json.loads((folder / "inlaid.json").read_text())["tasks"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _locked(folder: Path) -> int:
    """Lock a bank against a second server."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise VersionError(f"{folder.parent} is in use by another server; stop that one first") from None
    return descriptor


def _read(file: Path) -> _List:
    try:
        found = msgspec.json.decode(file.read_bytes(), type=_List)
    except (OSError, msgspec.MsgspecError) as error:
        raise VersionError(f"{file} cannot be used: {error}; put it back from a copy, or remove it") from error
    numbers = [version.number for version in found.versions]
    if found.format != FORMAT or not numbers or found.current not in numbers or len(set(numbers)) != len(numbers):
        raise VersionError(f"{file} is of another format or does not hold together; put it back, or remove it")
    if missing := [version.folder for version in found.versions if not os.path.isdir(version.folder)]:
        gone = {version.number for version in found.versions if version.folder in missing}
        if found.current in gone:
            raise VersionError(f"{missing[0]}, the version that was served, is gone; put it back, or remove {file}")
        found.versions = [version for version in found.versions if version.number not in gone]
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
