"""ServerState: what was changed over the API: the scheduler's settings, and adapters loaded, pinned or unloaded.

With `--state FILE` each change is written to the file before it is answered, and holds again when the server is started
anew. What the file says goes before the command line: it was said later. The routes of `admin.py` report changes.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from inlaid.config import ConfigError
from inlaid.files import read_bounded, write_atomically
from inlaid.server.errors import ApiError, NotKept

log = logging.getLogger(__name__)

_VERSION = 1
_T = TypeVar("_T")


class KeptAdapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter that was loaded over the API."""

    path: str
    pinned: bool = False


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of a state file. It holds no key."""

    kind: Literal["inlaid server state"] = "inlaid server state"
    version: int = _VERSION
    scheduler: dict[str, Any] = {}  # settings, as PUT /v1/scheduler takes them
    loaded: dict[str, KeptAdapter] = {}
    unloaded: tuple[str, ...] = ()  # adapters that the command line names


class ServerState:
    """The changes since the server was first started, in memory and, with a file, on disk."""

    def __init__(self, path: str, started_with: Iterable[str] = ()) -> None:
        self.path = Path(path).expanduser().absolute() if path else None
        self.kept = Kept()
        self._started_with = frozenset(started_with)
        self._lock: int | None = None
        self._writing = asyncio.Lock()
        self._written = self.kept
        self._finishing: set[asyncio.Task[Any]] = set()
        if self.path is not None:
            self._open(self.path)

    def starting_adapters(self, given: Mapping[str, str]) -> dict[str, str]:
        """Return the adapters of the command line that the state leaves as they are."""
        changed = {*self.kept.loaded, *self.kept.unloaded}
        return {name: path for name, path in given.items() if name not in changed}

    async def finish(self, change: Awaitable[_T]) -> _T:
        """Carry a change through, even if the client that asked for it leaves: what the engine does must be known
        here."""
        task = asyncio.ensure_future(change)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        return await asyncio.shield(task)

    async def note_scheduler(self, settings: Mapping[str, Any]) -> None:
        """Keep the settings that have been changed. NotKept: they hold, but the file cannot be written."""
        await self._keep(msgspec.structs.replace(self.kept, scheduler=dict(settings)))

    async def note_loaded(self, name: str, path: str, pinned: bool) -> None:
        """Keep an adapter that was loaded."""
        loaded = {**self.kept.loaded, name: KeptAdapter(path, pinned)}
        unloaded = tuple(other for other in self.kept.unloaded if other != name)
        await self._keep(msgspec.structs.replace(self.kept, loaded=loaded, unloaded=unloaded))

    async def note_unloaded(self, name: str) -> None:
        """Keep that an adapter was unloaded."""
        loaded = {other: adapter for other, adapter in self.kept.loaded.items() if other != name}
        unloaded = {*self.kept.unloaded, name} if name in self._started_with else self.kept.unloaded
        await self._keep(msgspec.structs.replace(self.kept, loaded=loaded, unloaded=tuple(sorted(unloaded))))

    def close(self) -> None:
        """Let another server use the file."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _keep(self, kept: Kept) -> None:
        """Write the state. Changes that come while it is being written share the next write."""
        self.kept = kept
        if self.path is None:
            return
        async with self._writing:
            if self._written is self.kept:
                return
            writing = self.kept
            try:
                await asyncio.to_thread(write_atomically, self.path, _encoded(writing))
            except OSError as error:
                log.error("the state cannot be written to %s: %s", self.path, error)
                raise NotKept(
                    f"the change is in force, but cannot be kept for the server's next start: {error.strerror}; make "
                    "room for the state file and change something again"
                ) from error
            self._written = writing

    def _open(self, path: Path) -> None:
        """Read the file, or write a first one, so that a folder that cannot be written to is known at the start."""
        try:
            self._lock = _locked(path)
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a server that was killed while it wrote
                left.unlink(missing_ok=True)
            if path.exists() or path.is_symlink():
                self.kept = _read(path)
            write_atomically(path, _encoded(self.kept))
        except OSError as error:
            self.close()
            raise ConfigError(f"--state {path} cannot be used: {error.strerror or error}") from error
        except ConfigError:
            self.close()
            raise
        self._written = self.kept


def _locked(path: Path) -> int:
    """Lock the file against a second server, by a file beside it, as it is replaced with each change."""
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"--state {path} is in use by another server; give each a file of its own") from None
    return descriptor


def _read(path: Path) -> Kept:
    """Read a state file. ConfigError: it is none, is damaged, or is of a later version."""
    advice = "give another file, or remove this one to start with the command line's settings"
    try:
        found = msgspec.json.decode(read_bounded(path))
        if not isinstance(found, dict) or found.get("kind") != Kept().kind:
            raise ConfigError(f"--state {path} is not a state file of inlaid; {advice}")
        if found.get("version") != _VERSION:
            version = found.get("version")
            raise ConfigError(f"--state {path} has version {version!r}, this inlaid reads {_VERSION}; {advice}")
        return msgspec.convert(found, Kept)
    except ConfigError:
        raise
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigError(f"--state {path} is damaged: {error}; {advice}") from error


def _encoded(kept: Kept) -> bytes:
    return msgspec.json.format(msgspec.json.encode(kept), indent=2) + b"\n"


async def restore(
    state: ServerState,
    set_scheduler: Callable[[dict[str, Any]], Awaitable[Any]],
    load: Callable[[str, KeptAdapter], Awaitable[Any]],
) -> None:
    """Change a freshly started engine as it was changed before. An adapter that cannot be served any more is logged and
    left out; it stays in the file. ConfigError: the scheduler does not take its settings."""
    kept = state.kept
    if kept.scheduler:
        try:
            await set_scheduler(kept.scheduler)
        except ValueError as error:
            raise ConfigError(f"--state {state.path}: {error}") from error
        log.info("the scheduler's settings are those of %s: %s", state.path, kept.scheduler)
    for name, adapter in kept.loaded.items():
        try:
            await load(name, adapter)
        except (ValueError, ApiError) as error:
            log.error("adapter %r of %s is left out: %s", name, state.path, error)
        else:
            log.info("adapter %r is served as %s says", name, state.path)
    if kept.unloaded:
        log.info("not served, as %s says: %s", state.path, ", ".join(kept.unloaded))
