"""`--lora-watch DIR`: a folder whose sub-folders are served as adapters. One is loaded under its name once it is
complete and has not changed between two scans, read again when its files change (weights with the same content hash
stay as they are, others are swapped in), and unloaded when it is gone. An adapter that cannot be served is logged once
and tried again when its files change. Everyone who may write to the folder decides what is served.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from inlaid.config import ConfigError
from inlaid.server.names import ModelNames
from inlaid.worker.errors import EngineDead, EngineError

log = logging.getLogger(__name__)

_FILES = ("adapter_config.json", "adapter_model.safetensors")

Signature = tuple[tuple[int, int, int], ...]  # inode, size and time of each file


class Loads(Protocol):
    """The engine as the watcher uses it."""

    @property
    def adapters(self) -> Collection[str]: ...

    async def load_adapter(self, name: str, path: str, in_place: bool = False) -> Any: ...

    async def unload_adapter(self, name: str) -> int: ...


@dataclass
class _Seen:
    """A sub-folder as the last scan found it, and as it was last read."""

    signature: Signature | None
    read: Signature | None = None
    serving: bool = False


class Watcher:
    """The watcher of one folder."""

    def __init__(self, folder: Path, engine: Loads, names: ModelNames) -> None:
        if not folder.is_dir():
            raise ConfigError(f"--lora-watch {folder} is not a folder")
        self._folder = folder.resolve()
        self._engine = engine
        self._names = names
        self._seen: dict[str, _Seen] = {}

    async def run(self, interval: float) -> None:
        """Reconcile again and again, for ever."""
        while True:
            try:
                await self.reconcile()
            except (OSError, EngineDead) as error:  # the disk or the engine may be back next time
                log.warning("watching %s: %s", self._folder, error)
            await asyncio.sleep(interval)

    async def reconcile(self) -> None:
        """Reconcile the served adapters with the folder once."""
        found = await asyncio.to_thread(_scan, self._folder)
        for name in {**self._seen, **found}:
            seen = self._seen.setdefault(name, _Seen(None))
            before, seen.signature = seen.signature, found.get(name)
            if seen.signature != before:
                continue  # it is being written or removed
            try:
                if seen.signature is None:
                    await self._gone(name, seen)
                elif seen.signature != seen.read:
                    await self._changed(name, seen)
            except (OSError, EngineDead):
                raise
            except Exception as error:  # one sub-folder must not keep the others from being served
                log.error("%s failed", self._folder / name, exc_info=error)

    async def _changed(self, name: str, seen: _Seen) -> None:
        seen.read = seen.signature
        why = self._names.why_not(name)
        if why is None and name in self._engine.adapters and not seen.serving:
            why = "its name is taken"
        if why is not None:
            log.error("%s is not served: %s", self._folder / name, why)
            return
        try:
            await self._engine.load_adapter(name, str(self._folder / name), in_place=seen.serving)
            seen.serving = True
        except EngineDead:
            seen.read = None
            raise
        except (ValueError, EngineError) as error:
            log.error("%s cannot be served%s: %s", self._folder / name, " anew" if seen.serving else "", error)

    async def _gone(self, name: str, seen: _Seen) -> None:
        if seen.serving and name in self._engine.adapters:
            await self._engine.unload_adapter(name)
        del self._seen[name]


def _scan(folder: Path) -> dict[str, Signature]:
    """Return the complete sub-folders. One whose name begins with a dot is still being written."""
    found = {}
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or not entry.name.isprintable() or not entry.is_dir():
            continue
        try:
            stats = [os.stat(Path(entry.path) / file) for file in _FILES]
        except OSError:
            continue
        found[entry.name] = tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)
    return found
