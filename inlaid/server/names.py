"""The names of models: the base's, its adapters', and `base:adapter`."""

from __future__ import annotations

from collections.abc import Collection

from inlaid.engine.refusal import Refusal, RefusalKind, Refused

MAX_NAME = 256


class ModelNames:
    """The base's names, and what they leave for adapters."""

    def __init__(self, base: str, path: str) -> None:
        self.base = base
        self._path = path  # where the base was loaded from, which is a name of it too

    def resolve(self, model: str, adapters: Collection[str], param: str = "model") -> str | None:
        """Return the adapter that a name stands for: its own name, or base:adapter. None is the base, by one of its
        names or by none."""
        adapter = self.adapter_in(model)
        if adapter in adapters and adapter != self.base:
            return adapter
        if model in ("", self.base, self._path):
            return None
        raise Refused(
            Refusal(
                f"model {model!r} does not exist here; GET /v1/models lists the base {self.base!r} and its adapters",
                RefusalKind.NOT_FOUND,
                param,
            )
        )

    def adapter_in(self, model: str) -> str:
        """Return the adapter's name in base:adapter; any other name as it is."""
        return model.removeprefix(f"{self.base}:")

    def why_not(self, adapter: str) -> str | None:
        """Return why an adapter cannot have this name; None: it can."""
        if not 0 < len(adapter) <= MAX_NAME or not adapter.isprintable():
            return f"a name has 1 to {MAX_NAME} printable characters"
        if adapter in (self.base, self._path):
            return "it is a name of the base"
        if self.adapter_in(adapter) != adapter:
            return f"{self.base}:NAME means the adapter NAME"
        return None
