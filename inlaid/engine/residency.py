"""What the host engine needs to know about adapters. The adapters package fulfils this protocol; the simulator
and the tests have their own. Nothing here touches a device."""

from __future__ import annotations

from typing import Protocol


class AdapterDirectory(Protocol):
    """Names, identities and residence of adapters. An identity is a content hash."""

    def resolve(self, name: str) -> str:
        """Return the identity behind a name and keep it loadable until release; raise ValueError if there is none."""
        ...

    def release(self, identity: str) -> None:
        """Gives back one resolve: its request has ended."""
        ...

    def ready(self, identity: str) -> bool:
        """Whether it is on the device. RuntimeError: it can never be, with the reason. TimeoutError: it has not come in
        the time it has, and may when it is asked for again."""
        ...

    def want(self, identity: str) -> None:
        """Please load it: a request near the front of the queue needs it. Cheap, may be repeated."""
        ...

    def pin(self, identity: str) -> None:
        """A scheduled request uses it: it must stay on the device until the matching unpin."""
        ...

    def unpin(self, identity: str) -> None: ...

    def rank(self, identity: str) -> int:
        """The largest rank of its modules, for the budget of ranks in a step."""
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
