"""The one way to say "not this request": a `Refusal` says why, `Refused` raises it.

The engine refuses at arrival by raising Refused, and later by ending the request with an Output that carries the
Refusal. Both reach the server unchanged, which turns the kind into a status.
"""

from __future__ import annotations

import enum

import msgspec


class RefusalKind(str, enum.Enum):
    INVALID = "invalid"  # the request can never be served as it is
    NOT_FOUND = "not_found"  # its adapter is not registered, or no longer
    TOO_MANY = "too_many"  # a limit or a full queue turns it away for now
    DEADLINE = "deadline"  # its deadline can no longer be met under the present load
    UNAVAILABLE = "unavailable"  # what it needs is not there yet
    FAULT = "fault"  # something broke on this side; the request may be fine


class Refusal(msgspec.Struct, frozen=True):
    """The reason that a request is not served; crosses the socket as it is."""

    message: str
    kind: RefusalKind = RefusalKind.INVALID
    param: str | None = None  # the field of the request at fault
    retry_after: float | None = None  # seconds after which the same request may be served; None: no reason to expect it


class Refused(ValueError):
    """The exception that refuses a request."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal

    @property
    def retry_after(self) -> float | None:
        return self.refusal.retry_after
