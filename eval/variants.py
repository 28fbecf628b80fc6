"""The ways to quantize a base, by name, as folders: made when asked for, found again when made before.

fp16                 the base as it is: what everything is compared with
rtn                  rounding to nearest in searched ranges (kinder than plain rounding), no data
gptq                 GPTQ on text that belongs to no task
gptq-mixed           GPTQ on all tasks' data mixed, no adapter attached
awq                  AWQ-style scaling on the same data; kept as plain weights, since a GPTQ file has no place for it
mlgptq-AGGREGATION   one Hessian for each task, its adapter attached, aggregated so (minimax-loss, max, mean, ...)
NAME=PATH            a folder made elsewhere
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from eval import provenance
from eval.grid import Base
from inlaid.checkpoint import Checkpoint, QuantSpec, quantization_config, to_tensors
from inlaid.files import atomic_folder
from inlaid.quant.adapter import NO_ADAPTER
from inlaid.quant.aggregate import AGGREGATIONS, TaskHessian, combine
from inlaid.quant.baselines import scaled_weight
from inlaid.quant.blocks import BlockModel
from inlaid.quant.calibration import CalibrationSettings, batches, load_calibration
from inlaid.quant.grid import Grid
from inlaid.quant.hessian import block_hessians
from inlaid.quant.quantize import quantize
from inlaid.quant.settings import Gate, Settings, TaskSource
from inlaid.quant.solver import round_to_nearest

DEFAULT = ("fp16", "rtn", "gptq", "gptq-mixed", "awq", "mlgptq-max", "mlgptq-mean", "mlgptq-minimax-loss")
GENERIC = Path(__file__).with_name("generic.jsonl")
WITHOUT_DATA = ("rtn", "gptq")


class VariantError(ValueError):
    """A variant cannot be made; the message says why."""


@dataclass(frozen=True)
class Source:
    """What quantizing reads for a task."""

    adapter: Path
    calibration: Path


class Variants:
    """All variants of one base for one set of tasks."""

    def __init__(
        self,
        base: Path,
        sources: Mapping[str, Source],
        group_size: int,
        folder: Path,
        generic: Path = GENERIC,
        calibration: CalibrationSettings | None = None,
    ) -> None:
        self.base, self.sources, self.group_size, self.folder, self.generic = base, sources, group_size, folder, generic
        self.calibration = calibration or CalibrationSettings()
        self.checkpoint = Checkpoint(base)

    def bases(self, names: Sequence[str], widths: Sequence[int]) -> list[Callable[[], Base]]:
        """The bases of a grid, full precision first; each is made when it is called."""
        for name in names:
            self._check(name)
        found: list[Callable[[], Base]] = [lambda: Base("fp16", 16, self.base)] if "fp16" in names else []
        for name in names:
            if "=" in name:
                found.append(lambda name=name: _given(name))  # type: ignore[misc]
            elif name != "fp16":
                found += [lambda name=name, bits=bits: self.base_of(name, bits) for bits in widths]  # type: ignore[misc]
        return found

    def base_of(self, name: str, bits: int) -> Base:
        """A variant at a width, made if need be."""
        out = self.folder / f"{name}-{bits}-{self._key(name, bits)[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:  # runs that share a cache make each base once
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.exists():
                self._make(name, self._grid(bits), out)
        return Base(name, bits, out)

    def _check(self, name: str) -> None:
        known = name in DEFAULT or "=" in name or name.removeprefix("mlgptq-") in AGGREGATIONS
        if not known:
            every = [*DEFAULT[:5], *(f"mlgptq-{aggregation}" for aggregation in AGGREGATIONS)]
            raise VariantError(f"there is no variant {name!r}; known: {', '.join(every)}, or NAME=PATH")
        if name == "fp16" or "=" in name:
            return
        if self.checkpoint.is_quantized:
            raise VariantError(f"{self.base} is quantized already; only NAME=PATH variants can be asked of it")
        if not self.sources and name not in WITHOUT_DATA:
            raise VariantError(f"variant {name} needs tasks that have an adapter and name a `calibration` file")

    def _grid(self, bits: int) -> Grid:
        return Grid.of_width(bits, self.group_size)

    def _key(self, name: str, bits: int) -> str:
        """Everything that the folder's content depends on."""
        facts: list[Any] = [name, bits, self.group_size, asdict(self.calibration)]
        facts.append(provenance.base_identity(self.base))
        facts.append(provenance.code_identity("quant", "checkpoint.py"))
        if name == "gptq":
            facts.append(hashlib.sha256(self.generic.read_bytes()).hexdigest())
        if name not in WITHOUT_DATA:
            for task, source in sorted(self.sources.items()):
                data = hashlib.sha256(source.calibration.read_bytes()).hexdigest()
                facts.append([task, provenance.adapter_identity(source.adapter), data])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _make(self, name: str, grid: Grid, out: Path) -> None:
        if name == "rtn":
            self._round(replace(grid, act_order=False), out)
        elif name == "awq":
            self._scale(grid, out)
        elif name == "gptq":
            self._quantize([TaskSource("generic", Path("none"), self.generic)], "mean", grid, out, "generic")
        elif name == "gptq-mixed":
            sources = [TaskSource(task, Path("none"), source.calibration) for task, source in self.sources.items()]
            self._quantize(sources, "sum", grid, out, "mixed")
        else:
            sources = [TaskSource(task, s.adapter, s.calibration) for task, s in self.sources.items()]
            self._quantize(sources, name.removeprefix("mlgptq-"), grid, out, "tasks")

    def _quantize(self, sources: list[TaskSource], aggregation: str, grid: Grid, out: Path, bank: str) -> None:
        """Made under one name for all that share Hessians, since the bank lies beside it, then put in its place. The
        quantizer's own gate is left open: judging is what this harness is for."""
        work = self.folder / f"work-{bank}"
        settings = Settings(grid=grid, aggregation=aggregation, calibration=self.calibration)
        quantize(self.base, sources, settings, work, gate=Gate(force=True))
        work.rename(out)

    def _round(self, grid: Grid, out: Path) -> None:
        tensors = {name: self.checkpoint.tensor(name) for name in self.checkpoint.dense}
        for name in _linears(self.checkpoint):
            weight_KN = tensors.pop(f"{name}.weight").float().T.contiguous()
            tensors |= to_tensors(name, round_to_nearest(weight_KN, grid).packed(grid))
        with self._folder(out, grid.spec, grid.damping) as folder:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def _scale(self, grid: Grid, out: Path) -> None:
        tensors = {name: self.checkpoint.tensor(name) for name in self.checkpoint.dense}
        for name, hessian_KK in self.mixed_hessians:
            weight_KN = tensors[f"{name}.weight"].float().T.contiguous()
            tensors[f"{name}.weight"] = scaled_weight(weight_KN, hessian_KK, grid).T.contiguous()
        with self._folder(out) as folder:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    @functools.cached_property
    def mixed_hessians(self) -> list[tuple[str, Tensor]]:
        """Each linear with the Hessian of all tasks' data mixed; of one base at a time, so that memory holds them."""
        model, found = BlockModel(self.checkpoint), []
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        data = [load_calibration(s.calibration, tokenizer, self.calibration) for s in self.sources.values()]
        streams = [model.start(batches(calibration.fitting)) for calibration in data]
        for index in range(model.num_blocks):
            with model.loaded(index) as block:
                sites = [block_hessians(model, block, index, NO_ADAPTER, one, advance=True) for one in streams]
            hessians = [(site.hessians(), site.total) for site in sites]
            for site, names in sites[0].members.items():
                tasks = [TaskHessian(lambda held=held: held[site], total) for held, total in hessians]  # type: ignore[misc]  # noqa: B023
                mixed_KK = combine("sum", tasks)
                found += [(name, mixed_KK) for name in names]
        return found

    @contextmanager
    def _folder(self, out: Path, spec: QuantSpec | None = None, damping: float = 0.0) -> Iterator[Path]:
        """A new model folder with the base's tokenizer and config."""
        config = dict(self.checkpoint.config)
        if spec is not None:
            config["quantization_config"] = quantization_config(spec, damping, static_groups=False)
        with atomic_folder(out) as folder:
            for file in self.base.iterdir():
                if (
                    file.is_file()
                    and file.suffix in (".json", ".jinja", ".model", ".txt")
                    and "safetensors" not in file.name
                ):
                    shutil.copyfile(file, folder / file.name)
            (folder / "config.json").write_text(json.dumps(config, indent=2))
            yield folder


def _linears(checkpoint: Checkpoint) -> list[str]:
    return list(BlockModel(checkpoint).shapes())


def _given(text: str) -> Base:
    """NAME=PATH, with the bits that its config names."""
    name, _, path = text.partition("=")
    checkpoint = Checkpoint(path)
    bits = int((checkpoint.quantization or {}).get("bits", 16))
    return Base(name, bits, Path(path))
