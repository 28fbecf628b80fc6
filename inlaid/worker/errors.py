"""Errors between the server and the engine process. A request that is refused raises `Refused` instead."""

from __future__ import annotations

from inlaid.engine.refusal import Refusal, RefusalKind, Refused


class EngineError(RuntimeError):
    """Something on our side went wrong."""


class EngineDead(EngineError):
    """The engine process is not there (yet, or any more)."""


class RequestTimeout(EngineError):
    """The request took longer than it may."""


def exception_of(refusal: Refusal) -> Exception:
    """Return what to raise for a refusal that has come from the engine process."""
    return EngineError(refusal.message) if refusal.kind is RefusalKind.FAULT else Refused(refusal)
