"""The protocol by which the engine asks where adapters are. The adapters package implements it, and so do the
simulator and the tests. Nothing here touches a device."""

from __future__ import annotations

from typing import Protocol


class AdapterDirectory(Protocol):
    """Names, identities and residence of adapters. An identity is a content hash."""

    def resolve(self, name: str) -> str:
        """Return the identity behind a name and keep it loadable until release; raise ValueError if there is none."""
        ...

    def release(self, identity: str) -> None:
        """Give back one resolve: its request has ended."""
        ...

    def ready(self, identity: str) -> bool:
        """Return True if the adapter is on the device. Raise RuntimeError, with the reason, if it can never be, and
        TimeoutError if it has not come in the time it has but may when it is asked for again."""
        ...

    def want(self, identity: str) -> None:
        """Ask for the adapter to be loaded, as a request near the front of the queue needs it; may be repeated."""
        ...

    def pin(self, identity: str) -> None:
        """Keep the adapter on the device until the matching unpin, as a scheduled request uses it."""
        ...

    def unpin(self, identity: str) -> None:
        """Give back one pin."""
        ...

    def rank(self, identity: str) -> int:
        """Return the largest rank of the adapter's modules, for the budget of ranks in a step."""
        ...

    def load_seconds(self, identity: str) -> tuple[float, float]:
        """Return the seconds of the reading (0: host memory had it) and of the copy that brought it to the device."""
        ...


class NoAdapters:
    """The directory of an engine that serves its base model only."""

    def resolve(self, name: str) -> str:
        raise ValueError(f"adapter {name!r} is unknown: this engine has no adapters")

    def release(self, identity: str) -> None: ...

    def ready(self, identity: str) -> bool:
        raise RuntimeError("this engine has no adapters")

    def want(self, identity: str) -> None: ...

    def pin(self, identity: str) -> None: ...

    def unpin(self, identity: str) -> None: ...

    def rank(self, identity: str) -> int:
        return 0

    def load_seconds(self, identity: str) -> tuple[float, float]:
        return 0.0, 0.0
