"""`inlaid.json`, the record in a quantized folder: what it was made from and how, and the names of all files that the
job wrote. Only what a record names is ever removed.

Version 2 names adapters by the identity that serving uses, and lists the files. Version 1 named them by
sha256(config + weights); where the adapter is still there, reading such a record translates it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from inlaid.adapters.adapter import AdapterError
from inlaid.adapters.peft import former_identity_of, identity_of
from inlaid.config import ConfigError
from inlaid.quant.settings import NO_ADAPTER_PATH, QuantizeError, Settings, TaskSource

RECORD = "inlaid.json"
VERSION = 2


@dataclass(frozen=True)
class Record:
    """Base, settings, tasks with their hashes and losses, the cost of solving each site, the seconds of the job that
    wrote it, by part, and the files that it wrote.
    """

    out: Path
    base: dict[str, str]
    settings: Settings
    tasks: dict[str, dict[str, Any]]
    sites: list[dict[str, Any]]
    seconds: dict[str, float] = field(default_factory=dict)
    files: tuple[str, ...] = ()  # empty: version 1, which did not list them
    shares: dict[str, float] = field(default_factory=dict)  # of each task in the weights of minimax-loss
    by_trace: bool = True  # whether those are the weights of trace-normalised Hessians

    @classmethod
    def read(cls, out: Path) -> Record:
        """Read a folder's record. QuantizeError: it has none that can be used."""
        try:
            values = json.loads((out / RECORD).read_text())
            version = values["version"]
            if version not in (1, VERSION):
                raise QuantizeError(
                    f"{out / RECORD} has version {version}; this program reads up to {VERSION}: update it"
                )
            settings = Settings.from_record(values["settings"])
            seconds, files = values.get("seconds", {}), tuple(map(str, values.get("files", ())))
            if any(Path(name).name != name for name in files):
                raise ValueError("it names files outside of its folder")
            shares = {str(name): float(share) for name, share in values.get("shares", {}).items()}
            by_trace = bool(values.get("by_trace", True))
            record = cls(
                out, values["base"], settings, values["tasks"], values["sites"], seconds, files, shares, by_trace
            )
            return record if version == VERSION else record._translated()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise QuantizeError(f"{out} has no {RECORD}: only folders made by `inlaid quantize` have tasks") from error
        except QuantizeError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise QuantizeError(f"{out / RECORD} cannot be used: {error}; quantize again") from error

    def values(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"version": VERSION, **{name: value for name, value in asdict(self).items() if name != "out"}}

    def naming(self, files: Iterable[str]) -> Record:
        """Return the same record with the files of its folder."""
        return replace(self, files=tuple(files))

    def even_shares(self) -> dict[str, float]:
        """Return the shares of tasks that count the same."""
        return {name: 1 / len(self.tasks) for name in self.tasks}

    @property
    def base_path(self) -> Path:
        return (self.out / self.base["path"]).resolve()

    def sources(self) -> list[TaskSource]:
        return [
            TaskSource(name, self._path(task["adapter"]), self._path(task["data"])) for name, task in self.tasks.items()
        ]

    def _path(self, stored: str) -> Path:
        return Path(stored) if stored == NO_ADAPTER_PATH else (self.out / stored).resolve()

    def _translated(self) -> Record:
        """Replace identities of version 1 by those of now, where the adapters can still be found."""
        tasks = {name: task | {"adapter_hash": self._identity(task)} for name, task in self.tasks.items()}
        return replace(self, tasks=tasks)

    def _identity(self, task: dict[str, Any]) -> str:
        recorded = str(task["adapter_hash"])
        if task["adapter"] == NO_ADAPTER_PATH:
            return recorded
        try:
            path = self._path(task["adapter"])
            identity = identity_of(path)
            return identity if former_identity_of(path, identity) == recorded else recorded
        except (AdapterError, OSError):
            return recorded


def stored_path(path: Path, out: Path) -> str:
    """Return a path as the record keeps it: from the folder, so that both may move together."""
    return NO_ADAPTER_PATH if str(path) == NO_ADAPTER_PATH else os.path.relpath(path.resolve(), out.resolve())
