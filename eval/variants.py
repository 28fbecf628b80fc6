"""Variants: the ways to quantize a base, by name, as folders that are made once and found again.

fp16                 the base as it is: everything is compared with it
rtn                  rounding to nearest in searched ranges (kinder than plain rounding), no data
gptq                 GPTQ on text that belongs to no task
gptq-mixed           GPTQ on all tasks' data mixed, no adapter attached
awq                  AWQ-style scaling on the same data; kept as plain weights, since a GPTQ file has no place for it
mlgptq-AGGREGATION   one Hessian for each task, its adapter attached, aggregated so (minimax-loss, max, mean, ...)
per-task             a base for each task alone: the bound, which no shared base can pass
NAME=PATH            a folder made elsewhere
VARIANT+kv-FORM      one of these with keys and values in another form: fp8, int8 (`inlaid/kv_format.py`)
all                  every one of these but NAME=PATH
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from eval import provenance, yardsticks
from eval.grid import Base
from eval.yardsticks import SiteHessian
from inlaid.adapters.peft import identity_of
from inlaid.checkpoint import Checkpoint
from inlaid.config import ConfigError
from inlaid.kv_format import AUTO, kv_format
from inlaid.quant.aggregate import AGGREGATIONS
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.grid import Grid
from inlaid.quant.quantize import quantize
from inlaid.quant.settings import Gate, Place, Settings, TaskSource

FULL, MIXED, BOUND = "fp16", "gptq-mixed", "per-task"
DEFAULT = (FULL, "rtn", "gptq", MIXED, "awq", "mlgptq-max", "mlgptq-mean", "mlgptq-minimax-loss")
ALL = (FULL, "rtn", "gptq", MIXED, "awq", *(f"mlgptq-{aggregation}" for aggregation in AGGREGATIONS), BOUND)
FORM = "+kv-"
GENERIC = Path(__file__).with_name("generic.jsonl")
WITHOUT_TASKS = ("rtn", "gptq")
WITHOUT_DATA = ("rtn",)  # equal at every seed


class VariantError(ValueError):
    """A variant cannot be made; the message says why."""


@dataclass(frozen=True)
class Source:
    """The files that quantizing reads for a task."""

    adapter: Path
    calibration: Path


class Variants:
    """All variants of one base for one set of tasks. `grids` has the quantizer's grid for each width."""

    def __init__(
        self,
        base: Path,
        sources: Mapping[str, Source],
        grids: Mapping[int, Grid],
        folder: Path,
        generic: Path = GENERIC,
        calibration: CalibrationSettings | None = None,
        device: str = "cpu",
    ) -> None:
        self.base, self.sources, self.grids, self.folder, self.generic = base, sources, grids, folder, generic
        self.device = device
        self.calibration = calibration or CalibrationSettings()
        self.checkpoint = Checkpoint(base)
        self._mixed: tuple[int, list[SiteHessian]] | None = None

    def bases(self, names: Sequence[str], seeds: Sequence[int] = (0,)) -> list[Callable[[], Base]]:
        """Return the bases of a grid, full precision first; each is made when it is called."""
        names = ALL if tuple(names) == ("all",) else names
        pairs = [_with_form(name) for name in names]
        for stem, _ in pairs:
            self._check(stem)
        found: list[Callable[[], Base]] = [lambda: Base(FULL, 16, self.base)] if FULL in names else []
        for stem, form in pairs:
            made = self._bases_of(stem, seeds) if (stem, form) != (FULL, AUTO.name) else []
            found += made if form == AUTO.name else [partial(_in_form, make, form) for make in made]
        return found

    def _bases_of(self, name: str, seeds: Sequence[int]) -> list[Callable[[], Base]]:
        """Return the bases of one variant."""
        if name == FULL:
            return [lambda: Base(FULL, 16, self.base)]
        if "=" in name:
            return [partial(_given, name)]
        tasks = sorted(self.sources) if name == BOUND else [None]
        drawn = seeds[:1] if name in WITHOUT_DATA else seeds
        return [
            partial(self.base_of, name, bits, seed, task) for seed in drawn for bits in self.grids for task in tasks
        ]

    def base_of(self, name: str, bits: int, seed: int = 0, task: str | None = None) -> Base:
        """Return a variant at a width for a calibration seed, made if need be; of `per-task`, the base of one task."""
        stem = name if task is None else f"{name}-{task}"
        out = self.folder / f"{stem}-{bits}-{self._key(name, bits, seed, task)[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        bank = self._bank(name, seed, task)
        with (self.folder / f".{bank}.lock").open("w") as lock:  # runs that share a cache make each base once
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.exists():
                self._make(name, bits, seed, task, out)
        return Base(name, bits, out, seed, task)

    def _check(self, name: str) -> None:
        if name not in ALL and "=" not in name:
            known = f"{', '.join(ALL)}, all, or NAME=PATH, each with {FORM}fp8 or {FORM}int8 behind it"
            raise VariantError(f"there is no variant {name!r}; known: {known}")
        if name == FULL or "=" in name:
            return
        if self.checkpoint.is_quantized:
            raise VariantError(f"{self.base} is quantized already; only NAME=PATH variants can be asked of it")
        if not self.sources and name not in WITHOUT_TASKS:
            raise VariantError(f"variant {name} needs tasks that have an adapter and name a `calibration` file")

    def _key(self, name: str, bits: int, seed: int, task: str | None) -> str:
        """Return the hash of everything that the folder's content depends on."""
        facts: list[Any] = [name, asdict(self.grids[bits]), asdict(self._calibration(name, seed)), self.device]
        facts.append(provenance.base_identity(self.base))
        facts.append(provenance.code_identity("quant", "checkpoint.py"))
        if name == "gptq":
            facts.append(hashlib.sha256(self.generic.read_bytes()).hexdigest())
        if name not in WITHOUT_TASKS:
            for one, source in sorted(self.sources.items()):
                if task in (None, one):
                    data = hashlib.sha256(source.calibration.read_bytes()).hexdigest()
                    facts.append([one, identity_of(source.adapter), data])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _calibration(self, name: str, seed: int) -> CalibrationSettings:
        """Return the settings of a seed. Only data that a task's adapter was trained for has answers to highlight."""
        highlight = self.calibration.highlight if name.startswith("mlgptq-") or name == BOUND else 1.0
        return replace(self.calibration, seed=seed, highlight=highlight)

    def _bank(self, name: str, seed: int, task: str | None) -> str:
        """Name the bank of Hessians that a variant shares with others."""
        kinds = {"rtn": "rtn", "awq": "awq", "gptq": "generic", MIXED: "mixed", BOUND: f"alone-{task}"}
        return f"{kinds.get(name, 'tasks')}-{seed}"

    def _make(self, name: str, bits: int, seed: int, task: str | None, out: Path) -> None:
        grid, calibration = self.grids[bits], self._calibration(name, seed)
        if name == "rtn":
            yardsticks.write_rounded(self.checkpoint, replace(grid, act_order=False), out)
            return
        if name == "awq":
            yardsticks.write_scaled(self.checkpoint, self._mixed_hessians(calibration), grid, out)
            return
        work = self.folder / f"work-{self._bank(name, seed, task)}"
        settings = Settings(grid=grid, aggregation=self._aggregation(name), calibration=calibration)
        # Made under one name for all that share Hessians, since the bank lies beside it, then put in its place. The
        # quantizer's own gate is left open: judging is what this harness is for.
        quantize(self.base, self._task_sources(name, task), settings, work, Place(self.device), Gate(force=True))
        work.rename(out)

    def _aggregation(self, name: str) -> str:
        return {"gptq": "mean", MIXED: "sum", BOUND: "mean"}.get(name) or name.removeprefix("mlgptq-")

    def _task_sources(self, name: str, task: str | None) -> list[TaskSource]:
        if name == "gptq":
            return [TaskSource("generic", Path("none"), self.generic)]
        return [
            TaskSource(one, Path("none") if name == MIXED else source.adapter, source.calibration)
            for one, source in self.sources.items()
            if task in (None, one)
        ]

    def _mixed_hessians(self, calibration: CalibrationSettings) -> list[SiteHessian]:
        """Return the Hessians of one seed; those of one seed at a time are held."""
        if self._mixed is None or self._mixed[0] != calibration.seed:
            files = [source.calibration for source in self.sources.values()]
            self._mixed = calibration.seed, yardsticks.mixed_hessians(self.checkpoint, files, calibration)
        return self._mixed[1]


def _with_form(name: str) -> tuple[str, str]:
    """Return a variant without its ending +kv-FORM, and the form of keys and values."""
    stem, found, form = name.rpartition(FORM)
    try:
        return (stem, kv_format(form).name) if found else (name, AUTO.name)
    except ConfigError as error:
        raise VariantError(f"variant {name}: {error}") from error


def _in_form(make: Callable[[], Base], form: str) -> Base:
    base = make()
    return replace(base, variant=f"{base.variant}{FORM}{form}", kv=form)


def _given(text: str) -> Base:
    """Return NAME=PATH as a base, with the bits that its config names."""
    name, _, path = text.partition("=")
    bits = int((Checkpoint(path).quantization or {}).get("bits", 16))
    return Base(name, bits, Path(path))
