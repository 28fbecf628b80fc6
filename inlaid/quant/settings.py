"""What a quantizing job is asked to do, and `inlaid.json`, where the finished folder says what was done."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from inlaid.config import ConfigError, from_dict
from inlaid.quant.aggregate import AGGREGATIONS, MINIMAX_LOSS
from inlaid.quant.bank import PRECISIONS
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.grid import Grid

RECORD = "inlaid.json"
NO_ADAPTER_PATH = "none"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class QuantizeError(ValueError):
    """The job cannot be done as asked; the message says what would help."""


@dataclass(frozen=True)
class TaskSource:
    """A task as the user names it. The adapter "none" is the base alone."""

    name: str
    adapter: Path
    data: Path

    @classmethod
    def parse(cls, text: str) -> TaskSource:
        """NAME=ADAPTER:DATA."""
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)=(.+):(.+)", text)
        if match is None:
            raise QuantizeError(f"{text!r} is not NAME=ADAPTER:DATA (a name, an adapter's folder, a .jsonl file)")
        return cls(match[1], Path(match[2]), Path(match[3]))

    @property
    def has_adapter(self) -> bool:
        return str(self.adapter) != NO_ADAPTER_PATH


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result besides base and tasks."""

    grid: Grid = field(default_factory=Grid)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    aggregation: str = MINIMAX_LOSS
    sequential: bool = False
    bank_precision: str = "float32"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for value, allowed in (
            (self.aggregation, AGGREGATIONS),
            (self.dtype, DTYPES),
            (self.bank_precision, PRECISIONS),
        ):
            if value not in allowed:
                raise QuantizeError(f"{value!r} is not one of {', '.join(allowed)}")

    @classmethod
    def from_record(cls, values: dict[str, Any]) -> Settings:
        grid, calibration = values["grid"], values["calibration"]
        parts = {"grid": from_dict(Grid, grid), "calibration": from_dict(CalibrationSettings, calibration)}
        return from_dict(cls, values | parts)


@dataclass(frozen=True)
class Place:
    """Where it runs, and whom it tells: `progress(step, done, total)` after every piece of work."""

    device: str = "cpu"
    offload: bool = False
    progress: Callable[[str, int, int], None] = lambda step, done, total: None


@dataclass(frozen=True)
class Gate:
    """How much worse an old task may get, in nats per token of the answer; `force` writes all the same."""

    tolerance: float = 0.02
    force: bool = False


@dataclass(frozen=True)
class Record:
    """`inlaid.json`: base, settings, tasks with their hashes and losses, what solving each site cost, and the seconds
    of the job that wrote it, by part."""

    out: Path
    base: dict[str, str]
    settings: Settings
    tasks: dict[str, dict[str, Any]]
    sites: list[dict[str, Any]]
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, out: Path) -> Record:
        try:
            values = json.loads((out / RECORD).read_text())
            settings = Settings.from_record(values["settings"])
            return cls(out, values["base"], settings, values["tasks"], values["sites"], values.get("seconds", {}))
        except FileNotFoundError as error:
            raise QuantizeError(f"{out} has no {RECORD}: only folders made by `inlaid quantize` have tasks") from error
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise QuantizeError(f"{out / RECORD} cannot be used: {error}; quantize again") from error

    def values(self) -> dict[str, Any]:
        """As it is written."""
        return {"version": 1, **{name: value for name, value in asdict(self).items() if name != "out"}}

    @property
    def base_path(self) -> Path:
        return (self.out / self.base["path"]).resolve()

    def sources(self) -> list[TaskSource]:
        return [
            TaskSource(name, self._path(task["adapter"]), self._path(task["data"])) for name, task in self.tasks.items()
        ]

    def _path(self, stored: str) -> Path:
        return Path(stored) if stored == NO_ADAPTER_PATH else (self.out / stored).resolve()


def stored_path(path: Path, out: Path) -> str:
    """A path as the record keeps it: from the folder, so that both may move together."""
    return NO_ADAPTER_PATH if str(path) == NO_ADAPTER_PATH else os.path.relpath(path.resolve(), out.resolve())


def bank_path(out: Path) -> Path:
    """The bank lies beside the checkpoint, so that replacing the folder does not move it."""
    return out.with_name(out.name + ".bank")
