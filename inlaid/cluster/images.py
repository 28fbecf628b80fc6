"""Images: the weight image that new replicas on the front's machine start from, instead of reading and packing files.

A replica that serves writes it into anonymous memory of the front, so it is gone when the front is, however that ends.
It is kept for the next replica, whose pages it shares, and written anew when what the replicas serve has changed.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from typing import Any

from inlaid.engine.refusal import Refused
from inlaid.worker.errors import EngineError
from inlaid.worker.interface import ServingEngine

log = logging.getLogger(__name__)

_PATIENCE = 120.0  # seconds that a replica has to write an image
_FINAL = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL  # it is not changed any more


class Images:
    """The image of what the replicas serve now."""

    def __init__(self) -> None:
        self.bytes = 0
        self._of: Any = None  # what it was written of
        self._descriptor: int | None = None
        self._refused = False

    async def of(self, engine: ServingEngine) -> str:
        """Return the path of an image of what an engine serves, which has it written if need be. Empty: there is none,
        and the log says why."""
        served = _served(engine)
        if self._refused or served == self._of:
            return "" if self._descriptor is None else _path(self._descriptor)
        self.close()
        descriptor = os.memfd_create("inlaid-weights", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        try:
            self.bytes = await asyncio.wait_for(engine.call("write_image", path=_path(descriptor)), _PATIENCE)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _FINAL)
        except (EngineError, Refused, OSError, asyncio.TimeoutError) as error:
            os.close(descriptor)
            self._refused = isinstance(error, Refused)
            log.info("new replicas read their weights from disk: %s", error or "no image was written in time")
            return ""
        self._of, self._descriptor = served, descriptor
        return _path(descriptor)

    def close(self) -> None:
        """Give up the image; replicas that have mapped it keep what they mapped."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._of, self._descriptor, self.bytes = None, None, 0


def _path(descriptor: int) -> str:
    """Return a path by which other processes of this user open a file of this one."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _served(engine: ServingEngine) -> Any:
    """Return what an engine serves: its base, and the weights of its adapters."""
    assert engine.model is not None
    return engine.model.base_version, sorted((info.path, info.identity) for info in engine.adapters.values())
