"""The jobs of `inlaid quantize` and `inlaid task`: from a 16-bit base and its tasks to a GPTQ folder. A job is a plan
(read and checked), a loop over the blocks, the accuracy gate before and after it, and the publishing of the folder.

independent mode  blocks see the activations of the unquantized base, so a task's Hessians are its own for ever: adding
                  or removing a task re-solves from the bank and ends in the same bits as quantizing all at once.
sequential mode   blocks see the activations of their quantized predecessors. Hessians then depend on every other task:
                  nothing is banked, and every change of tasks runs all of them again.

A killed run resumes: the bank's files and the written blocks are found again under names that hold the job's hash. The
finished folder takes its place in one step, after the gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from inlaid.adapters.gate import GateError
from inlaid.quant.aggregate import ENOUGH, LOSS_ROUNDS, MINIMAX_LOSS, PATIENCE, raised
from inlaid.quant.bank import Bank, bank_path
from inlaid.quant.blocks import BlockModel
from inlaid.quant.gate import GateTask, fits, quantized_losses, regressions, why_unfit
from inlaid.quant.loop import BlockLoop, Progress, Weights
from inlaid.quant.losses import Loss, recorded
from inlaid.quant.plan import Plan, Task
from inlaid.quant.publish import Publisher, check_target, only_job, read_record, recover, remove_partial
from inlaid.quant.record import Record, stored_path
from inlaid.quant.settings import SHARED, WARM, Gate, Place, QuantizeError, Settings, Shortcuts, TaskSource
from inlaid.quant.warm import StoredSolution

Facts = list[dict[str, Any]]  # what solving each site cost


def quantize(
    base: Path,
    sources: Sequence[TaskSource],
    settings: Settings,
    out: Path,
    place: Place | None = None,
    gate: Gate | None = None,
) -> Record:
    """Quantize a base for its tasks into a folder."""
    if not sources:
        raise QuantizeError("give at least one task: --task NAME=ADAPTER:DATA")
    check_target(out, _inputs(base, sources))
    with only_job(out):
        recover(out)
        check_target(out, {})
        return _Job(Plan(base, sources, settings, place or Place()), Into(out, bank_path(out)), gate or Gate()).run({})


def add_task(
    out: Path,
    source: TaskSource,
    place: Place | None = None,
    gate: Gate | None = None,
    into: Into | None = None,
    shortcuts: Shortcuts | None = None,
) -> Record:
    """Take one more task into a folder that `quantize` made; only that task is run for Hessians. `into`: leave that
    folder as it is and write the new version elsewhere.
    """
    with _folder(out, into) as record:
        if source.name in record.tasks:
            raise QuantizeError(f"{out} already has a task {source.name}; remove it first")
        change = _Change(record, into or Into(record.out, bank_path(record.out)), shortcuts or Shortcuts())
        return change.run([*record.sources(), source], place, gate)


def remove_task(
    out: Path,
    name: str,
    place: Place | None = None,
    gate: Gate | None = None,
    into: Into | None = None,
    shortcuts: Shortcuts | None = None,
) -> Record:
    """Take a task out: the rest is solved again from the bank. `into` is that of `add_task`."""
    with _folder(out, into) as record:
        if name not in record.tasks:
            raise QuantizeError(f"{out} has no task {name}; it has {', '.join(sorted(record.tasks))}")
        sources = [source for source in record.sources() if source.name != name]
        if not sources:
            raise QuantizeError(f"{name} is the only task of {out}; a base is quantized for at least one")
        change = _Change(record, into or Into(record.out, bank_path(record.out)), shortcuts or Shortcuts())
        return change.run(sources, place, gate)


@dataclass(frozen=True)
class Into:
    """The place of a new version: its folder, the bank to use, and entries of the bank that other versions need."""

    folder: Path
    bank: Path
    keep: frozenset[str] = frozenset()


@contextmanager
def _folder(out: Path, into: Into | None) -> Iterator[Record]:
    """Hold the locks of a folder and of the new version's; yields the folder's record."""
    read_record(out)  # before a lock is laid beside what is no such folder
    with only_job(out), only_job(into.folder) if into else nullcontext():
        recover(out)
        if into is not None:
            recover(into.folder)
        yield Record.read(out)


@dataclass(frozen=True)
class _Change:
    """Another set of tasks for a folder that is there: what the job may take over from it."""

    record: Record
    into: Into
    shortcuts: Shortcuts

    def run(self, sources: Sequence[TaskSource], place: Place | None, gate: Gate | None) -> Record:
        record, names = self.record, {source.name for source in sources}
        check_target(self.into.folder, _inputs(record.base_path, sources))
        plan = Plan(record.base_path, sources, record.settings, place or Place())
        plan.check_unchanged(record)
        if plan.settings.sequential and self.shortcuts.solve == WARM:
            raise QuantizeError("in sequential mode every solution depends on all tasks: leave solve at exact")
        known = {name: task for name, task in record.tasks.items() if name in names}
        return _Job(plan, self.into, gate or Gate(), self).run(known)


def _inputs(base: Path, sources: Sequence[TaskSource]) -> dict[str, Path]:
    """Everything that a job reads, by what a message calls it."""
    adapters = {f"the adapter of task {source.name}": source.adapter for source in sources if source.has_adapter}
    return {"the base": base, **adapters, **{f"the data of task {source.name}": source.data for source in sources}}


class _Job:
    """One run of a plan into a folder."""

    def __init__(self, plan: Plan, into: Into, gate: Gate, change: _Change | None = None) -> None:
        self._plan, self._into, self._gate, self._out = plan, into, gate, into.folder
        self._bank = Bank(into.bank, plan.settings.bank_precision)
        self._shortcuts = change.shortcuts if change else Shortcuts()
        self._stored = None
        if change is not None and self._shortcuts.solve == WARM:
            self._stored = StoredSolution(change.record, self._bank, self._shortcuts.threshold)
        variant = "" if self._shortcuts == Shortcuts() else repr(self._shortcuts)
        self._publisher = Publisher(self._out, plan, variant)
        self._progress = Progress(plan, self._bank, LOSS_ROUNDS if self._weighs else 1)
        self._loop = BlockLoop(plan, self._bank, self._progress, self._stored)
        self._weighed: dict[str, float] = {}  # nats an answer on the full-precision base
        self._weights: Weights | None = None  # those that the folder is made with

    def run(self, known: Mapping[str, Any]) -> Record:
        """Make the folder; `known` are the records of tasks that have passed the gate before."""
        plan = self._plan
        self._weighed = {
            task.name: known[task.name]["weighed_full"]
            for task in plan.tasks
            if task.name in known and known[task.name]["bank_key"] == task.key and "weighed_full" in known[task.name]
        }
        with plan.stopwatch.part("checking"):
            full = self._check_new([task for task in plan.tasks if task.name not in known])
        full |= {name: task["loss_full"] for name, task in known.items()}
        plan.adopt_former_entries(self._bank)
        self._publisher.tidy()
        partial, facts = self._candidate()
        with plan.stopwatch.part("checking"):
            after = self._losses(plan.open(partial), [task.checked for task in plan.tasks])
        why_worse = self._why_worse({name: recorded(task) for name, task in known.items()}, after)
        if why_worse and not self._gate.keep:
            self._publisher.discard()
            raise GateError(f"{why_worse}; {self._out} is as it was (--force writes all the same)")
        record = self._publisher.publish(partial, self._record(full, after, facts))
        self._bank.keep_only({task.key for task in plan.tasks} | self._into.keep)
        self._progress.end()
        if why_worse:
            raise GateError(f"{why_worse}; the version stays in {self._out}, unused")
        return record

    def _check_new(self, tasks: Sequence[Task]) -> dict[str, float]:
        """Ask the gate about tasks that are new; returns their losses on the full-precision base."""
        found = fits(self._plan.model, [task.checked for task in tasks], self._progress.say) if tasks else {}
        vocabulary = int(self._plan.model.model.config.vocab_size)
        unfit = [f"{name}: {reason}" for name, fit in found.items() if (reason := why_unfit(fit, vocabulary))]
        if unfit and not self._gate.force:
            raise GateError(f"refused before quantizing: {'; '.join(unfit)} (--force takes it all the same)")
        self._progress.step("tasks checked")
        return {name: fit.full for name, fit in found.items()}

    @property
    def _weighs(self) -> bool:
        """True if the tasks' shares are found by solving several times."""
        return self._plan.settings.aggregation == MINIMAX_LOSS and len(self._plan.tasks) > 1 and self._stored is None

    def _candidate(self) -> tuple[Path, Facts]:
        """Build the version that is to take the output's place; returns it and what its sites cost."""
        tasks = self._plan.tasks
        even_T = torch.ones(len(tasks), dtype=torch.float64) / len(tasks)
        if not self._weighs:
            self._weights = Weights(even_T)
            if self._stored is not None:
                shares_T = self._stored.new_shares([task.name for task in tasks])
                self._weights = Weights(shares_T, self._stored.by_trace)
            return self._built(0, self._weights)
        full_T = self._weighing_losses(self._plan.model, self._weighed)
        self._weighed = {task.name: float(full) for task, full in zip(tasks, full_T, strict=True)}
        best: tuple[float, Path, Facts] | None = None
        weights, in_vain = Weights(even_T, by_trace=False), 0  # rounds since the best, of those with raised weights
        for number in range(LOSS_ROUNDS):
            partial, facts = self._built(number, weights)
            excess_T = (self._weighing_losses(self._plan.open(partial)) - full_T).clamp(min=0)
            beaten: Path | None = partial
            in_vain += number > 1
            if best is None or float(excess_T.max()) < best[0]:
                beaten = best[1] if best is not None else None
                best, in_vain = (float(excess_T.max()), partial, facts), 0
                self._weights, last = weights, (weights, excess_T)
            elif number > 1:
                last = weights, excess_T  # raised from here on: from the best they would come out the same
            if beaten is not None:  # two folders at most: a killed run solves beaten rounds again, to the same bits
                remove_partial(beaten)
            if best[0] <= ENOUGH or in_vain == PATIENCE:
                break
            weights = Weights(even_T)
            if number > 0:
                weights = Weights(raised(last[0].shares_T, last[1]), last[0].by_trace)
        assert best is not None
        return best[1:]

    def _built(self, number: int, weights: Weights) -> tuple[Path, Facts]:
        partial = self._publisher.partial(number)
        facts = self._loop.fill(partial, weights)
        with self._plan.stopwatch.part("writing"):
            self._publisher.complete(partial)
        return partial, facts

    def _weighing_losses(self, model: BlockModel, known: Mapping[str, float] = MappingProxyType({})) -> Tensor:
        """Return nats an answer, task by task; those that are known already are not measured again."""
        tasks, asked = self._plan.tasks, [task for task in self._plan.tasks if task.name not in known]
        with self._plan.stopwatch.part("checking"):
            found = self._losses(model, [task.weighed for task in asked]) if asked else {}
        losses = dict(known) | {task.name: found[task.name].mean * task.answer_length for task in asked}
        return torch.tensor([losses[task.name] for task in tasks], dtype=torch.float64)

    def _losses(self, model: BlockModel, tasks: list[GateTask]) -> dict[str, Loss]:
        return quantized_losses(model, tasks, self._progress.say, self._shortcuts.check == SHARED)

    def _why_worse(self, before: Mapping[str, Loss], after: Mapping[str, Loss]) -> str | None:
        """Return why the new version is refused, if an old task has lost by it."""
        worse = regressions(before, after, self._gate.tolerance)
        if not worse or self._gate.force:
            return None
        return f"old tasks would become worse: {'; '.join(worse)}"

    def _record(self, full: Mapping[str, float], after: Mapping[str, Loss], facts: Facts) -> Record:
        plan, now = self._plan, datetime.now(timezone.utc).isoformat(timespec="seconds")
        tasks = {
            task.name: {
                "adapter": stored_path(task.source.adapter, self._out),
                "adapter_hash": task.adapter_identity,
                "data": stored_path(task.source.data, self._out),
                "data_hash": task.calibration.data_hash,
                "bank_key": task.key,
                "tokens": sum(len(sequence.ids) for sequence in task.calibration.fitting),
                "loss_full": full[task.name],
                "loss_quantized": after[task.name].mean,
                "nats": [round(nats, 5) for nats in after[task.name].nats],
                "answer_tokens": list(after[task.name].tokens),
                "checked": now,
                **({"weighed_full": self._weighed[task.name]} if task.name in self._weighed else {}),
            }
            for task in plan.tasks
        }
        assert self._weights is not None
        shares = dict(zip(tasks, self._weights.shares_T.tolist(), strict=True))
        base = {"path": stored_path(plan.base, self._out), "fingerprint": plan.fingerprint}
        seconds = {part: round(spent, 4) for part, spent in sorted(plan.stopwatch.seconds.items())}
        by_trace = self._weights.by_trace
        return Record(self._out, base, plan.settings, tasks, facts, seconds, shares=shares, by_trace=by_trace)
