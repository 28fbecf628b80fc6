"""Adapters that are loaded when a request first names them. `--lora-resolver-root DIR` finds NAME in DIR/NAME;
`--lora-resolver MODULE:FUNCTION` asks a function, which gives a path or None and may be async. Paths are confined to
the resolver's root, or for a function to the server's --lora-root folders. A name that was not found, or whose adapter
cannot be served, is not looked for again for a while; requests that name the same new adapter at the same time wait for
one load. When the engine takes no more adapters, the idle one that was named least recently makes room.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from inlaid.config import ConfigError, ServerConfig
from inlaid.server.errors import ApiError, BadRequest, TooMany
from inlaid.server.names import ModelNames
from inlaid.server.safety import AllowedFolders
from inlaid.worker.messages import AdapterInfo

log = logging.getLogger(__name__)

_FORGET = 30.0  # seconds until a name that was not found is looked for again
_MAX_REMEMBERED = 4096  # names that were not found, and as many aliases

_Kept = TypeVar("_Kept")

Find = Callable[[str], Any]


class Loads(Protocol):
    """The engine as the resolver uses it."""

    @property
    def adapters(self) -> Collection[str]: ...

    async def load_adapter(self, name: str, path: str) -> Any: ...

    async def describe_adapter(self, name: str) -> AdapterInfo: ...

    async def unload_adapter(self, name: str) -> int: ...


class Resolver:
    """Adapters found by their names, and loaded. A folder is served under one name, however many lead to it."""

    def __init__(
        self,
        find: Find,
        folders: AllowedFolders,
        engine: Loads,
        names: ModelNames,
        *,
        most: int,
        room: int,
        canonical: Callable[[str], str | None] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find = find
        self._folders = folders
        self._engine = engine
        self._names = names
        self._most = most  # being looked for at a time
        self._room = room  # adapters that the engine takes
        self._canonical = canonical
        self._clock = clock
        self._refused: OrderedDict[str, tuple[float, str]] = OrderedDict()  # until when, and why ("": not found)
        self._loading: dict[str, asyncio.Task[str | None]] = {}
        self._served: OrderedDict[str, Path] = OrderedDict()  # loaded here, least recently named first
        self._aliases: OrderedDict[str, str] = OrderedDict()

    async def resolve(self, name: str) -> str | None:
        """Load the adapter of this name, if there is one, and return the name under which it is served."""
        known = self._canonical(name)
        if known is None or self._names.why_not(known) is not None:
            return None
        served = self._aliases.get(known, known)
        if served in self._engine.adapters:
            self.note_use(served)
            return served
        if self._is_refused(known):
            return None
        task = self._loading.get(known)
        if task is None:
            if len(self._loading) >= self._most:
                raise TooMany(f"{len(self._loading)} adapters are being looked for already", retry_after=1)
            task = self._loading[known] = asyncio.create_task(self._load(known))
            task.add_done_callback(partial(self._done, known))
        loaded = await asyncio.shield(task)  # a client that leaves does not end it for the others
        self._is_refused(known)
        return loaded

    def note_use(self, name: str | None) -> None:
        """Record that a request names an adapter."""
        if name is not None and name in self._served:
            self._served.move_to_end(name)

    def _done(self, name: str, task: asyncio.Task[None]) -> None:
        self._loading.pop(name, None)
        if not task.cancelled():
            task.exception()  # those who wait have it, if any still do

    def _is_refused(self, name: str) -> bool:
        """Return True if the name was not found lately. BadRequest: it was found, and cannot be served."""
        until, why = self._refused.get(name, (0.0, ""))
        if self._clock() >= until:
            return False
        if why:
            raise BadRequest(why, "model")
        return True

    async def _load(self, name: str) -> str | None:
        try:
            folder = await self._folder_of(name)
        except Exception as error:  # a function of the operator's may raise anything
            log.error("looking for adapter %r failed", name, exc_info=error)
            folder = None
        if folder is None:
            self._refuse(name, "")
            return None
        if (served := self._name_of(folder)) is not None:
            _remember(self._aliases, name, served)
            return served
        await self._make_room()
        try:
            await self._engine.load_adapter(name, str(folder))
        except ValueError as error:
            log.error("adapter %r was found and cannot be served: %s", name, error)
            self._refuse(name, f"adapter {name!r} was found but cannot be served; the server's log says why")
            return None
        self._served[name] = folder
        return name

    def _name_of(self, folder: Path) -> str | None:
        """Return the name under which a folder is served already."""
        self._served = OrderedDict((n, f) for n, f in self._served.items() if n in self._engine.adapters)
        return next((name for name, served in self._served.items() if served == folder), None)

    async def _make_room(self) -> None:
        """Unload the adapter that was named least recently and has no requests, if the engine takes no more."""
        if len(self._engine.adapters) < self._room:
            return
        for name in list(self._served):
            info = await self._engine.describe_adapter(name)
            if not info.requests and not info.pinned:
                log.info("adapter %r is unloaded to make room", name)
                await self._engine.unload_adapter(name)
                self._served.pop(name, None)
                return
        raise TooMany(f"{len(self._engine.adapters)} adapters are loaded, the most allowed, and in use", retry_after=5)

    async def _folder_of(self, name: str) -> Path | None:
        if inspect.iscoroutinefunction(self._find):
            path = await self._find(name)
        else:
            path = await asyncio.to_thread(self._find, name)
        if path is None:
            return None
        try:
            return self._folders.resolve(str(path))
        except ApiError:
            return None

    def _refuse(self, name: str, why: str) -> None:
        _remember(self._refused, name, (self._clock() + _FORGET, why))


def _remember(memory: OrderedDict[str, _Kept], name: str, kept: _Kept) -> None:
    """Put something under a name, and forget the oldest beyond the limit."""
    memory[name] = kept
    memory.move_to_end(name)
    while len(memory) > _MAX_REMEMBERED:
        memory.popitem(last=False)


def make_resolver(config: ServerConfig, engine: Loads, names: ModelNames, room: int) -> Resolver | None:
    """Make the resolver of a configuration, if it has one. ConfigError says why it cannot be made."""
    root, function = config.lora_resolver_root, config.lora_resolver
    if not root and not function:
        return None
    if root and function:
        raise ConfigError("give --lora-resolver-root or --lora-resolver, not both")
    if function and not config.lora_root:
        raise ConfigError("--lora-resolver needs --lora-root, the folders that it may find adapters in")
    if config.max_lora_resolving < 1:
        raise ConfigError("max_lora_resolving must be at least 1")
    folders = AllowedFolders([root] if root else config.lora_root)
    find, canonical = (_function(function), str) if function else (_same_name, partial(_within, folders.roots[0]))
    most = config.max_lora_resolving
    return Resolver(find, folders, engine, names, most=most, room=room, canonical=canonical)


def _same_name(name: str) -> str:
    """Return a name as a path within the root."""
    return name


def _within(root: Path, name: str) -> str | None:
    """Return the one name that a path within the root has: relative, without dots and doubled or trailing slashes."""
    path = PurePosixPath(name)
    try:
        return (path.relative_to(root) if path.is_absolute() else path).as_posix()
    except ValueError:
        return None


def _function(name: str) -> Find:
    module, _, attribute = name.partition(":")
    try:
        found: Find = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--lora-resolver {name}: {error}; write MODULE:FUNCTION") from error
    return found
