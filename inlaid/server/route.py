"""Route: one line of the API. `routes.py` lists them, `app.py` serves them and `openapi.py` describes them."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web


class Guard(enum.Enum):
    OPEN = "open"  # no key: for probes and scrapers
    INFERENCE = "inference"
    OPERATOR = "operator"  # tells about tenants: the admin key where there is one, else as inference
    ADMIN = "admin"


@dataclass(frozen=True)
class Route:
    """A handler takes the request, and the decoded body where there is one."""

    method: str
    path: str
    handler: Callable[..., Awaitable[web.StreamResponse]]
    guard: Guard = Guard.INFERENCE
    body: type[Any] | None = None
    answers: tuple[Any, ...] = ()  # types: whole, and each event of a stream
    text: str = ""  # the media type of an answer that is text
    query: tuple[tuple[str, Mapping[str, Any]], ...] = ()  # name and JSON schema
    answering: bool = False  # makes tokens: waited for when the server drains
    strict: bool = False  # unknown fields are refused though the body changes nothing

    @property
    def lenient(self) -> bool:
        """True where an unknown field may be left out: not where a body changes the server, or is a program."""
        return self.guard is Guard.INFERENCE and not self.strict
