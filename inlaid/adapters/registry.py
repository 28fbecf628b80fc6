"""Adapters by name and by identity. A name stands for one identity; an identity is held as long as a name or a request
refers to it. The store is the only caller.
"""

from __future__ import annotations

from inlaid.adapters.adapter import AdapterError
from inlaid.adapters.held import Held


class Registry:
    """Names, identities, and the names that keep their adapter on the device."""

    def __init__(self, max_held: int) -> None:
        self.max_held = max_held
        self.held: dict[str, Held] = {}  # by identity
        self._identity_of: dict[str, str] = {}

    def names(self) -> list[str]:
        return sorted(self._identity_of)

    def identity(self, name: str) -> str | None:
        return self._identity_of.get(name)

    def find(self, name: str) -> Held | None:
        """Return the adapter that a name stands for, or None."""
        identity = self._identity_of.get(name)
        return None if identity is None else self.held[identity]

    def named(self, name: str) -> Held:
        """Return the adapter that a name stands for."""
        held = self.find(name)
        if held is None:
            raise AdapterError(f"adapter {name!r} is not loaded; loaded: {', '.join(self.names()) or 'none'}")
        return held

    def check_room(self, name: str, identity: str) -> None:
        """Refuse one more adapter, or one more name, than may be held."""
        is_new, is_new_name = identity not in self.held, name not in self._identity_of
        if len(self.held) + is_new > self.max_held or len(self._identity_of) + is_new_name > self.max_held:
            raise AdapterError(
                f"{self.max_held} adapters are loaded, the most allowed; unload one or raise --max-cpu-loras"
            )

    def bind(self, name: str, held: Held) -> Held | None:
        """Let a name stand for an adapter. Returns the one that it stood for, if that was another."""
        before = self.find(name)
        self._identity_of[name] = held.identity
        held.names.add(name)
        if before is None or before is held:
            return None
        before.names.discard(name)
        before.kept.discard(name)
        return before

    def unbind(self, name: str) -> Held:
        """Forget a name. Returns the adapter that it stood for."""
        held = self.named(name)
        del self._identity_of[name]
        held.names.discard(name)
        held.kept.discard(name)
        return held

    def check(self) -> None:
        """Assert that names and identities agree."""
        for name, identity in self._identity_of.items():
            assert name in self.held[identity].names, f"name {name}"
        assert all(held.kept <= held.names for held in self.held.values()), "kept for a name that is gone"
        for identity, held in self.held.items():
            assert not held.is_idle, f"{identity} is held for nobody"
