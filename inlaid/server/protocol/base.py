"""The two kinds of struct that cross HTTP."""

from __future__ import annotations

import msgspec


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """A body that a client sends. JSON has no cycles, so the garbage collector need not look at it."""


class Payload(msgspec.Struct, kw_only=True):
    """A body, or an event of a stream, that the server sends."""
