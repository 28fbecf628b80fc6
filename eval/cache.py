"""Answers already given, one file for each (base, adapter, task, backend): what makes a killed run go on where it was.

The file's name is the hash of its key, and the key holds everything that an answer depends on. Files are written whole,
so a kill leaves none half-written; one that cannot be read is asked again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from eval.metrics import Answer
from inlaid.files import write_atomically


class Key(msgspec.Struct, frozen=True, kw_only=True):
    base: str
    tokenizer: str
    adapter: str  # an identity, or "none" for the base alone
    task: str  # fingerprint of definition and examples
    backend: str
    setting: str
    draft: bool

    def digest(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class _Entry(msgspec.Struct, frozen=True):
    key: Key
    answers: tuple[tuple[str, str | None, float | None, int], ...]


class Cache:
    """A folder of answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: Key) -> list[Answer] | None:
        try:
            entry = msgspec.json.decode(self._path(key).read_bytes(), type=_Entry)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        return [Answer(*fields) for fields in entry.answers] if entry.key == key else None

    def put(self, key: Key, answers: Sequence[Answer]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = tuple((a.text, a.choice, a.target_nll, a.target_tokens) for a in answers)
        write_atomically(self._path(key), msgspec.json.encode(_Entry(key, rows)))

    def _path(self, key: Key) -> Path:
        return self.folder / f"{key.digest()}.json"
