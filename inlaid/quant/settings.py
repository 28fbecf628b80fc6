"""The request of a quantizing job: tasks, settings, the device, and how strict the accuracy gate is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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

    `progress(step, done, total)` is called after every piece of work, `note(sentence)` with what was read, `rest`
    between pieces as often as possible (it may sleep), `watch` once, with the seconds by part as they grow.
    """

    device: str = "cpu"
    offload: bool = False
    progress: Callable[[str, int, int], None] = lambda step, done, total: None
    note: Callable[[str], None] = lambda sentence: None
    rest: Callable[[], object] | None = None
    watch: Callable[[Mapping[str, float]], object] = lambda seconds: None


EXACT, WARM, SHARED = "exact", "warm", "shared"


@dataclass(frozen=True)
class Shortcuts:
    """Approximations that adding or removing a task may use; by default none.

    solve "warm"     start from the stored solution: a site whose aggregated Hessian has moved by less than `threshold`
                     keeps it, others improve its codes and steps under the new Hessian. Tasks keep their stored shares
                     of the weights, and nothing is solved more than once
    check "shared"   the gate runs sequences of several tasks in one forward pass, each row with its own adapter; sums
                     are added in another order, so losses may differ in their last digits
    """

    solve: str = EXACT
    check: str = EXACT
    threshold: float = 0.01

    def __post_init__(self) -> None:
        if self.solve not in (EXACT, WARM):
            raise QuantizeError(f"solve {self.solve!r} is not one of {EXACT}, {WARM}")
        if self.check not in (EXACT, SHARED):
            raise QuantizeError(f"check {self.check!r} is not one of {EXACT}, {SHARED}")
        if not self.threshold >= 0:
            raise QuantizeError(f"threshold is {self.threshold}: give a share of the Hessian's norm, 0 or more")


@dataclass(frozen=True)
class Gate:
    """The strictness of the accuracy gate: how much worse an old task may get, in nats per token of the answer; `force`
    writes all the same, `keep` leaves a refused version in its folder.
    """

    tolerance: float = 0.02
    force: bool = False
    keep: bool = False
