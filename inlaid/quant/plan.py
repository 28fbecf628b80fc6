"""The plan of a job, read and checked before anything is written: the base, and each task's adapter, data and place in
the bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from inlaid.adapters.adapter import Adapter
from inlaid.adapters.peft import former_identity_of, read_adapter
from inlaid.checkpoint import Checkpoint, quantization_config
from inlaid.model.spec import read_spec
from inlaid.quant.bank import Bank, Entry, entry_key
from inlaid.quant.blocks import BlockModel, Stream
from inlaid.quant.calibration import Calibration, load_calibration
from inlaid.quant.examples import CalibrationError
from inlaid.quant.gate import GateTask
from inlaid.quant.record import Record
from inlaid.quant.settings import DTYPES, Place, QuantizeError, Settings, TaskSource
from inlaid.quant.stopwatch import Stopwatch
from inlaid.text.tokenizer_files import as_transformers

WEIGHING = 64  # sequences of each task that minimax-loss measures


@dataclass(eq=False)
class Task:
    """A task, read and checked, on its way through the blocks. `adapter` None is the base alone."""

    source: TaskSource
    adapter: Adapter | None
    calibration: Calibration
    key: str  # of its entry in the bank
    streams: list[Stream] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def adapter_identity(self) -> str:
        return identity_in_bank(self.adapter)

    @property
    def checked(self) -> GateTask:
        """The examples that the accuracy gate is asked about."""
        return GateTask(self.name, self.adapter, self.calibration.held_out)

    @property
    def weighed(self) -> GateTask:
        """The examples that minimax-loss measures: calibration data, so that the gate's stay unseen."""
        return GateTask(self.name, self.adapter, self.calibration.fitting[:WEIGHING])

    @property
    def answer_length(self) -> float:
        measured = self.weighed.sequences
        return sum(len(sequence.ids) - max(sequence.answer, 1) for sequence in measured) / len(measured)


def identity_in_bank(adapter: Adapter | None) -> str:
    """Return the adapter's identity, or the word for the base alone."""
    return "none" if adapter is None else adapter.identity


class Plan:
    """A base and its tasks, read and checked."""

    def __init__(self, base: Path, sources: Sequence[TaskSource], settings: Settings, place: Place) -> None:
        names = [source.name for source in sources]
        if len(set(names)) != len(names):
            raise QuantizeError(f"two tasks have the same name: {', '.join(sorted(names))}")
        self.base, self.settings, self.place = base, settings, place
        self.stopwatch = Stopwatch(torch.device(place.device), place.rest)
        place.watch(self.stopwatch.seconds)
        with self.stopwatch.part("reading"):
            self.model = self.open(base)
            self.checkpoint = self.model.checkpoint
            if self.checkpoint.is_quantized:
                raise QuantizeError(f"{base} is quantized already; give the 16-bit model that it was made from")
            self._check_shapes()
            self.fingerprint = self.checkpoint.fingerprint()
            tokenizer = read_tokenizer(base)
            # Sorted: any history of additions and removals must sum in the same order.
            self.tasks = [self._task(source, tokenizer) for source in sorted(sources, key=lambda source: source.name)]

    @property
    def key(self) -> str:
        """Hash everything that decides the result: partial work of a killed job is taken over under this name."""
        return entry_key(tasks={task.name: task.key for task in self.tasks}, settings=asdict(self.settings))

    def open(self, folder: Path) -> BlockModel:
        """Open a model's folder for running by blocks."""
        device, dtype = torch.device(self.place.device), DTYPES[self.settings.dtype]
        checkpoint = Checkpoint(folder, None if device.type == "cpu" else device)
        return BlockModel(checkpoint, self.place.device, dtype, self.place.offload, self.stopwatch)

    def quantization(self) -> dict[str, Any]:
        """Return what the output's configuration says of its format."""
        grid = self.settings.grid
        return quantization_config(grid.spec, grid.damping, grid.static_groups)

    def check_unchanged(self, record: Record) -> None:
        """Refuse to mix what a folder was made from with something else."""
        if record.base["fingerprint"] != self.fingerprint:
            raise QuantizeError(f"{self.base} is not the base that {record.out} was made from: it has changed since")
        for task in self.tasks:
            known = record.tasks.get(task.name)
            for what, now in (("adapter", task.adapter_identity), ("data", task.calibration.data_hash)):
                if known and known[f"{what}_hash"] != now:
                    raise QuantizeError(f"the {what} of task {task.name} has changed; remove the task and add it again")

    def adopt_former_entries(self, bank: Bank) -> None:
        """Rename the bank's entries that are keyed by the identity which the quantizer gave adapters formerly."""
        for task in self.tasks:
            if task.adapter is not None and not bank.entry(task.key).path.exists() and bank.path.is_dir():
                former = former_identity_of(task.source.adapter, task.adapter.identity)
                if former is not None:
                    bank.rename(self._key(former, task.calibration), task.key)

    def entries(self, bank: Bank) -> list[Entry]:
        """Return each task's place in the bank."""
        return [bank.entry(task.key) for task in self.tasks]

    def _task(self, source: TaskSource, tokenizer: Any) -> Task:
        adapter = None
        if source.has_adapter:
            adapter = read_adapter(source.adapter, read_spec(self.base), DTYPES[self.settings.dtype])
        try:
            calibration = load_calibration(source.data, tokenizer, self.settings.calibration)
        except CalibrationError as error:
            raise CalibrationError(f"--task {source.name}: {error}") from error
        self.place.note(f"task {source.name}: {calibration.about}")
        return Task(source, adapter, calibration, self._key(identity_in_bank(adapter), calibration))

    def _key(self, adapter_identity: str, calibration: Calibration) -> str:
        return entry_key(
            base=self.fingerprint,
            adapter=adapter_identity,
            data=calibration.data_hash,
            calibration=asdict(self.settings.calibration),
            dtype=self.settings.dtype,
            device=torch.device(self.place.device).type,
        )

    def _check_shapes(self) -> None:
        for name, (outputs, inputs) in self.model.shapes().items():
            if reason := self.settings.grid.spec.why_not(inputs, outputs):
                raise QuantizeError(f"{name} cannot be quantized so: {reason}")


def read_tokenizer(base: Path) -> Any:
    """Return the tokenizer that lies beside the base's weights."""
    try:
        return as_transformers(base)
    except Exception as error:  # its readers raise anything where a file is not what they expect
        raise QuantizeError(f"{base} holds no tokenizer that can be read; copy it beside the weights") from error
