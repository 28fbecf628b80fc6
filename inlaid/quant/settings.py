"""The request of a quantizing job: tasks, settings, the device, and how strict the accuracy gate is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from inlaid.config import from_dict
from inlaid.quant.aggregate import AGGREGATIONS, MINIMAX_LOSS
from inlaid.quant.bank import PRECISIONS
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.grid import Grid

NO_ADAPTER_PATH = "none"
DTYPES = MappingProxyType({"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16})


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
        """Read NAME=ADAPTER:DATA."""
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
    """The device of a job, and its listeners.

    `progress(step, done, total)` is called after every piece of work, `note(sentence)` with what was read.
    """

    device: str = "cpu"
    offload: bool = False
    progress: Callable[[str, int, int], None] = lambda step, done, total: None
    note: Callable[[str], None] = lambda sentence: None


@dataclass(frozen=True)
class Gate:
    """The strictness of the accuracy gate: how much worse an old task may get, in nats per token of the answer; `force`
    writes all the same.
    """

    tolerance: float = 0.02
    force: bool = False
