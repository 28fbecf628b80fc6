"""Adapters that are loaded when a request first names them. `--lora-resolver-root DIR` finds NAME in DIR/NAME;
`--lora-resolver MODULE:FUNCTION` asks a function, which gives a path or None and may be async. Paths are confined to
the resolver's root, or for a function to the server's --lora-root folders. A name that was not found, or whose adapter
cannot be served, is not looked for again for a while; requests that name the same new adapter at the same time wait for
one load.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from inlaid.config import ConfigError, ServerConfig
from inlaid.server.errors import ApiError, BadRequest, TooMany
from inlaid.server.names import ModelNames
from inlaid.server.safety import AllowedFolders

log = logging.getLogger(__name__)

_FORGET = 30.0  # seconds until a name that was not found is looked for again
_MAX_REFUSED = 4096  # names remembered as not found

Find = Callable[[str], Any]


class Loads(Protocol):
    """The engine as the resolver uses it."""

    async def load_adapter(self, name: str, path: str) -> Any: ...


class Resolver:
    """Adapters found by their names, and loaded."""

    def __init__(
        self,
        find: Find,
        folders: AllowedFolders,
        engine: Loads,
        names: ModelNames,
        most: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find = find
        self._folders = folders
        self._engine = engine
        self._names = names
        self._most = most
        self._clock = clock
        self._refused: OrderedDict[str, tuple[float, str]] = OrderedDict()  # until when, and why ("": not found)
        self._loading: dict[str, asyncio.Task[None]] = {}

    async def resolve(self, name: str) -> None:
        """Load the adapter of this name, if there is one; the caller reports a name that is not found."""
        if self._is_refused(name) or self._names.why_not(name) is not None:
            return
        task = self._loading.get(name)
        if task is None:
            if len(self._loading) >= self._most:
                raise TooMany(f"{len(self._loading)} adapters are being looked for already", retry_after=1)
            task = self._loading[name] = asyncio.create_task(self._load(name))
            task.add_done_callback(partial(self._done, name))
        await asyncio.shield(task)  # a client that leaves does not end it for the others
        self._is_refused(name)

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

    async def _load(self, name: str) -> None:
        try:
            folder = await self._folder_of(name)
        except Exception as error:  # a function of the operator's may raise anything
            log.error("looking for adapter %r failed", name, exc_info=error)
            folder = None
        if folder is None:
            self._refuse(name, "")
            return
        try:
            await self._engine.load_adapter(name, str(folder))
        except ValueError as error:
            log.error("adapter %r was found and cannot be served: %s", name, error)
            self._refuse(name, f"adapter {name!r} was found but cannot be served; the server's log says why")

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
        self._refused[name] = (self._clock() + _FORGET, why)
        self._refused.move_to_end(name)
        while len(self._refused) > _MAX_REFUSED:
            self._refused.popitem(last=False)


def make_resolver(config: ServerConfig, engine: Loads, names: ModelNames) -> Resolver | None:
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
    return Resolver(_function(function) if function else _same_name, folders, engine, names, config.max_lora_resolving)


def _same_name(name: str) -> str:
    """Return a name as a path within the root."""
    return name


def _function(name: str) -> Find:
    module, _, attribute = name.partition(":")
    try:
        found: Find = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--lora-resolver {name}: {error}; write MODULE:FUNCTION") from error
    return found
