"""From a 16-bit base and its tasks to a GPTQ folder: what `inlaid quantize` and `inlaid task` do.

One loop over the blocks of the model. A block is loaded; each task that the bank does not know yet runs through it with
its adapter attached and leaves its Hessians in the bank; the Hessians of all tasks are aggregated and the block is
solved and written as one file. Memory holds one block, the Hessians of one block, and the hidden states of the tasks
that are new; old ones are checked so many at a time.

independent mode  blocks see the activations of the unquantized base, so a task's Hessians are its own for ever: adding
                  or removing a task re-solves from the bank and ends in the same bits as quantizing all at once.
sequential mode   blocks see the activations of their quantized predecessors. Hessians then depend on every other task:
                  nothing is banked, and every change of tasks runs all of them again.

A killed run resumes: the bank's files and the written blocks are found again under names that hold the job's hash. The
finished folder takes its place in one step, after the gate.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from inlaid.checkpoint import Checkpoint, dequantize, quantization_config, to_tensors, write_index
from inlaid.files import remove_unfinished, replace_folder, sync_folder, write_atomically
from inlaid.quant.adapter import NO_ADAPTER, Adapter, read_adapter
from inlaid.quant.aggregate import LOSS_ROUNDS, MINIMAX_LOSS, TaskHessian, raised, solve_together
from inlaid.quant.bank import Bank, Entry, entry_key
from inlaid.quant.blocks import BlockModel, Stream
from inlaid.quant.calibration import Calibration, batches, load_calibration
from inlaid.quant.clock import Clock
from inlaid.quant.gate import GateRefusal, GateTask, fits, quantized_losses, regressions, why_unfit
from inlaid.quant.hessian import advance, block_hessians
from inlaid.quant.settings import (
    DTYPES,
    RECORD,
    Gate,
    Place,
    QuantizeError,
    Record,
    Settings,
    TaskSource,
    bank_path,
    stored_path,
)
from inlaid.tensorfiles import write_tensors

WEIGHING = 64  # sequences of each task that minimax-loss measures

_SiteHessians = dict[str, list[TaskHessian]]
_Members = dict[str, list[str]]
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5"}


@dataclass(eq=False)
class Task:
    """A task, read and checked, on its way through the blocks."""

    source: TaskSource
    adapter: Adapter
    calibration: Calibration
    key: str
    streams: list[Stream] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def gate(self) -> GateTask:
        return GateTask(self.name, self.adapter, self.calibration.held_out)

    @property
    def weighing(self) -> GateTask:
        """What minimax-loss measures: calibration data, so that the gate's stay unseen."""
        return GateTask(self.name, self.adapter, self.calibration.fitting[:WEIGHING])

    @property
    def answer_length(self) -> float:
        measured = self.weighing.sequences
        return sum(len(sequence.ids) - max(sequence.answer, 1) for sequence in measured) / len(measured)


def quantize(
    base: Path,
    sources: list[TaskSource],
    settings: Settings,
    out: Path,
    place: Place | None = None,
    gate: Gate | None = None,
) -> Record:
    """Quantize a base for its tasks into a folder."""
    if not sources:
        raise QuantizeError("give at least one task: --task NAME=ADAPTER:DATA")
    with _only_job(out):
        return _Job(base, sources, settings, out, place or Place(), gate or Gate()).run({})


def add_task(out: Path, source: TaskSource, place: Place | None = None, gate: Gate | None = None) -> Record:
    """Take one more task into a folder that `quantize` made; only that task is run for Hessians."""
    Record.read(out)  # before a lock is laid beside what is no such folder
    with _only_job(out):
        record = Record.read(out)
        if source.name in record.tasks:
            raise QuantizeError(f"{out} already has a task {source.name}; remove it first")
        return _again(record, [*record.sources(), source], record.tasks, place, gate)


def remove_task(out: Path, name: str, place: Place | None = None, gate: Gate | None = None) -> Record:
    """Take a task out: the rest is solved again from the bank."""
    Record.read(out)
    with _only_job(out):
        record = Record.read(out)
        if name not in record.tasks:
            raise QuantizeError(f"{out} has no task {name}; it has {', '.join(sorted(record.tasks))}")
        sources = [source for source in record.sources() if source.name != name]
        if not sources:
            raise QuantizeError(f"{name} is the only task of {out}; a base is quantized for at least one")
        return _again(record, sources, {key: task for key, task in record.tasks.items() if key != name}, place, gate)


def _again(
    record: Record, sources: list[TaskSource], known: dict[str, Any], place: Place | None, gate: Gate | None
) -> Record:
    job = _Job(record.base_path, sources, record.settings, record.out, place or Place(), gate or Gate())
    job.check_unchanged(record)
    return job.run(known)


@contextmanager
def _only_job(out: Path) -> Iterator[None]:
    """One job at a time on a folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.parent / f".{out.name}.lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise QuantizeError(f"another job is working on {out}; wait for it to end") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


class _Job:
    """One run: everything is read and checked before anything is written."""

    def __init__(
        self, base: Path, sources: list[TaskSource], settings: Settings, out: Path, place: Place, gate: Gate
    ) -> None:
        names = [source.name for source in sources]
        if len(set(names)) != len(names):
            raise QuantizeError(f"two tasks have the same name: {', '.join(sorted(names))}")
        if out.resolve() == base.resolve():
            raise QuantizeError(f"the output is the base itself ({base}); give another folder")
        self.base, self.settings, self.out, self.place, self.gate = base, settings, out, place, gate
        self.clock = Clock(torch.device(place.device))
        with self.clock.part("reading"):
            self.model = self._opened(base)
            self.checkpoint = self.model.checkpoint
            if self.checkpoint.is_quantized:
                raise QuantizeError(f"{base} is quantized already; give the 16-bit model that it was made from")
            self._check_shapes()
            self.fingerprint = self.checkpoint.fingerprint()
            tokenizer = _tokenizer(base)
            # Sorted: any history of additions and removals must sum in the same order.
            self.tasks = [self._task(source, tokenizer) for source in sorted(sources, key=lambda source: source.name)]
        self.bank = Bank(bank_path(out), settings.bank_precision)
        self.shares = torch.ones(len(self.tasks), dtype=torch.float64) / len(self.tasks)
        self.done, self.total = 0, self.model.num_blocks + 2

    def check_unchanged(self, record: Record) -> None:
        """Refuse to mix what a folder was made from with something else."""
        if record.base["fingerprint"] != self.fingerprint:
            raise QuantizeError(f"{self.base} is not the base that {self.out} was made from: it has changed since")
        for task in self.tasks:
            known = record.tasks.get(task.name)
            for what, now in (("adapter", task.adapter.identity), ("data", task.calibration.data_hash)):
                if known and known[f"{what}_hash"] != now:
                    raise QuantizeError(f"the {what} of task {task.name} has changed; remove the task and add it again")

    def run(self, known: dict[str, Any]) -> Record:
        """Hessians, solving, the gate, and the switch. `known` are the tasks that were there before."""
        self._say("everything read")
        with self.clock.part("checking"):
            full = self._check_new([task for task in self.tasks if task.name not in known])
        full |= {name: task["loss_full"] for name, task in known.items()}
        partial, facts = self._candidate()
        with self.clock.part("checking"):
            after = self._check_quantized(partial, {name: task["loss_quantized"] for name, task in known.items()})
        record = self._record(full, after, facts)
        write_atomically(partial / RECORD, json.dumps(record.values(), indent=1).encode())
        sync_folder(partial)
        replace_folder(partial, self.out)
        self._remove_partials()
        self.bank.keep_only({task.key for task in self.tasks})
        self.place.progress("done", self.total, self.total)
        return record

    # -- before the blocks

    def _task(self, source: TaskSource, tokenizer: Any) -> Task:
        adapter = read_adapter(source.adapter) if source.has_adapter else NO_ADAPTER
        adapter.check(self.model.shapes(), source.adapter)
        calibration = load_calibration(source.data, tokenizer, self.settings.calibration)
        key = entry_key(
            base=self.fingerprint,
            adapter=adapter.identity,
            data=calibration.data_hash,
            calibration=asdict(self.settings.calibration),
            dtype=self.settings.dtype,
            device=torch.device(self.place.device).type,
        )
        return Task(source, adapter, calibration, key)

    def _check_shapes(self) -> None:
        for name, (outputs, inputs) in self.model.shapes().items():
            if reason := self.settings.grid.spec.why_not(inputs, outputs):
                raise QuantizeError(f"{name} cannot be quantized so: {reason}")

    def _check_new(self, tasks: list[Task]) -> dict[str, float]:
        found = fits(self.model, [task.gate for task in tasks], self._say) if tasks else {}
        vocabulary = int(self.model.model.config.vocab_size)
        unfit = [f"{name}: {reason}" for name, fit in found.items() if (reason := why_unfit(fit, vocabulary))]
        if unfit and not self.gate.force:
            raise GateRefusal(f"refused before quantizing: {'; '.join(unfit)} (--force takes it all the same)")
        self._step("tasks checked")
        return {name: fit.full for name, fit in found.items()}

    def _candidate(self) -> tuple[Path, list[dict[str, Any]]]:
        """The finished folder that is to take the output's place, and what its sites cost."""
        if self.settings.aggregation != MINIMAX_LOSS or len(self.tasks) == 1:
            partial = self._partial()
            return partial, self._fill(partial)
        full = self._weighing_losses(self.model)
        best: tuple[float, Path, list[dict[str, Any]]] | None = None
        self.total += self.model.num_blocks * (LOSS_ROUNDS - 1)
        for number in range(LOSS_ROUNDS):
            partial = self._partial(number)
            facts = self._fill(partial)
            excess = (self._weighing_losses(self._opened(partial)) - full).clamp(min=0)
            beaten: Path | None = partial
            if best is None or float(excess.max()) < best[0]:
                beaten = best[1] if best is not None else None
                best = float(excess.max()), partial, facts
            if beaten is not None:  # two folders at most: a killed run solves beaten rounds again, to the same bits
                shutil.rmtree(beaten)
            self.shares = raised(self.shares, excess)
        assert best is not None
        return best[1:]

    def _fill(self, partial: Path) -> list[dict[str, Any]]:
        facts = self._solve_blocks(partial)
        with self.clock.part("writing"):
            self._finish_folder(partial)
        return facts

    def _opened(self, folder: Path) -> BlockModel:
        device, dtype = torch.device(self.place.device), DTYPES[self.settings.dtype]
        checkpoint = Checkpoint(folder, None if device.type == "cpu" else device)
        return BlockModel(checkpoint, self.place.device, dtype, self.place.offload, self.clock)

    def _weighing_losses(self, model: BlockModel) -> Tensor:
        """Nats an answer, task by task."""
        with self.clock.part("checking"):
            found = quantized_losses(model, [task.weighing for task in self.tasks], self._say)
        return torch.tensor([found[task.name] * task.answer_length for task in self.tasks], dtype=torch.float64)

    def _partial(self, number: int = 0) -> Path:
        """A folder to fill: that of a killed run of the very same job, else a new one; those of other jobs go."""
        key = entry_key(tasks={task.name: task.key for task in self.tasks}, settings=asdict(self.settings))
        for other in self.out.parent.glob(f".{self.out.name}.*.partial"):
            if f".{key}." not in other.name:
                shutil.rmtree(other)
        partial = self.out.parent / f".{self.out.name}.{key}.{number}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        remove_unfinished(partial)
        config = self.checkpoint.config | {"quantization_config": self._quantization()}
        write_atomically(partial / "config.json", json.dumps(config, indent=2).encode())
        return partial

    def _quantization(self) -> dict[str, Any]:
        grid = self.settings.grid
        return quantization_config(grid.spec, grid.damping, grid.static_groups)

    # -- the blocks

    def _solve_blocks(self, partial: Path) -> list[dict[str, Any]]:
        """Every block solved and written; those of a killed run are taken over."""
        self._start_streams()
        facts: list[dict[str, Any]] = []
        for index in range(self.model.num_blocks):
            shard, note = partial / f"model-block-{index:03d}.safetensors", partial / f".block-{index:03d}.json"
            with self.model.loaded(index) as block:
                if note.exists():
                    self._pass_written(block, index, partial)
                else:
                    tensors, solved = self._solve_block(block, index)
                    with self.clock.part("writing"):
                        write_tensors(shard, tensors, {"format": "pt"})
                        write_atomically(note, json.dumps(solved).encode())
            facts += json.loads(note.read_text())
            self._step(f"layer {index} solved")
        return facts

    def _start_streams(self) -> None:
        """Only tasks whose Hessians are still to be made travel through the blocks."""
        weight = self.settings.calibration.highlight
        for task in self.tasks:
            task.streams = []
            remove_unfinished(self.bank.entry(task.key).path)
            if self.settings.sequential or not self.bank.entry(task.key).complete(self.model.num_blocks):
                with self.clock.part("forward"):
                    task.streams = self.model.start(batches(task.calibration.fitting, weight))
                self.total += self.model.num_blocks

    def _solve_block(self, block: nn.Module, index: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        sequential, linears = self.settings.sequential, self.model.linears(index)
        sites, members = (self._fresh_hessians if sequential else self._banked_hessians)(block, index)
        tensors = self._untouched(index, set(linears))
        facts = []
        for site, hessians in sites.items():
            named = {name: linears[name].weight.detach().T.float() for name in members[site]}
            with self.clock.part("solving"):
                solution = solve_together(
                    self.settings.aggregation, torch.cat(list(named.values()), dim=1), hessians, self.settings.grid
                )
            facts.append({"site": site, "loss": solution.loss, "damping": solution.damping})
            start = 0
            for name, weight_KN in named.items():
                with self.clock.part("writing"):
                    packed = solution.columns(start, start + weight_KN.shape[1]).packed(self.settings.grid)
                    tensors |= to_tensors(name, packed)
                start += weight_KN.shape[1]
                if sequential:
                    linears[name].weight.data = dequantize(packed, self.model.dtype).T.contiguous()
        if sequential:
            for task in self.tasks:
                advance(self.model, block, index, task.adapter, task.streams)
        return tensors, facts

    def _pass_written(self, block: nn.Module, index: int, partial: Path) -> None:
        """A block that a killed run had finished: the streams only move past it."""
        moving = [task for task in self.tasks if task.streams]
        if self.settings.sequential:
            written = Checkpoint(partial)
            for name, linear in self.model.linears(index).items():
                weight_KN = dequantize(written.linear(name), self.model.dtype)
                linear.weight.data = weight_KN.T.contiguous().to(self.model.device)
        for task in moving:
            advance(self.model, block, index, task.adapter, task.streams)
            self._step(f"layer {index}, task {task.name}, resumed")

    def _banked_hessians(self, block: nn.Module, index: int) -> tuple[_SiteHessians, _Members]:
        """Every task's Hessians of a block, read from the bank; what is not there yet is made first."""
        entries = [self.bank.entry(task.key) for task in self.tasks]
        for task, entry in zip(self.tasks, entries, strict=True):
            if not task.streams:
                continue
            if entry.has(index):
                advance(self.model, block, index, task.adapter, task.streams)
            else:
                made = block_hessians(self.model, block, index, task.adapter, task.streams, advance=True)
                with self.clock.part("bank"):
                    entry.write(index, made.hessians(), made.members, made.total)
            self._step(f"layer {index}, task {task.name}")
        members = entries[0].members(index)
        shared = list(zip(entries, self.shares.tolist(), strict=True))
        sites = {site: [self._banked(entry, share, index, site) for entry, share in shared] for site in members}
        return sites, members

    def _banked(self, entry: Entry, share: float, index: int, site: str) -> TaskHessian:
        def read() -> Tensor:
            with self.clock.part("bank"):
                return entry.read(index, site, self.model.device)

        return TaskHessian(read, entry.tokens(index), share)

    def _fresh_hessians(self, block: nn.Module, index: int) -> tuple[_SiteHessians, _Members]:
        """Every task's Hessians of a block as its quantized predecessors make them."""
        sites: _SiteHessians = {}
        members: _Members = {}
        for task, share in zip(self.tasks, self.shares.tolist(), strict=True):
            made = block_hessians(self.model, block, index, task.adapter, task.streams, advance=False)
            members = made.members
            for site, hessian_KK in made.hessians().items():
                sites.setdefault(site, []).append(_held(hessian_KK, made.total, share))
            self._step(f"layer {index}, task {task.name}")
        return sites, members

    def _untouched(self, index: int, linears: set[str]) -> dict[str, Tensor]:
        """A block's other tensors (norms, biases), as the base has them."""
        prefix, weights = self.model.prefix(index), {f"{name}.weight" for name in linears}
        names = [name for name in self.checkpoint.dense if name.startswith(prefix) and name not in weights]
        return {name: self.checkpoint.tensor(name) for name in names}

    # -- after the blocks

    def _finish_folder(self, partial: Path) -> None:
        rest = [name for name in self.checkpoint.dense if not name.startswith("model.layers.")]
        tensors = {name: self.checkpoint.tensor(name) for name in rest}
        write_tensors(partial / "model-rest.safetensors", tensors, {"format": "pt"})
        write_index(partial)
        write_atomically(partial / "quantize_config.json", json.dumps(self._quantization(), indent=2).encode())
        for file in self.base.iterdir():
            weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
            if file.is_file() and not weights and not (partial / file.name).exists() and file.name != "README.md":
                shutil.copyfile(file, partial / file.name)

    def _check_quantized(self, partial: Path, before: dict[str, float]) -> dict[str, float]:
        """The losses on the new folder; refuses it if an old task has lost by it."""
        after = quantized_losses(self._opened(partial), [task.gate for task in self.tasks], self._say)
        worse = regressions(before, after, self.gate.tolerance)
        if worse and not self.gate.force:
            self._remove_partials()
            raise GateRefusal(
                f"old tasks would become worse by more than {self.gate.tolerance:g}: {'; '.join(worse)}; "
                f"{self.out} is as it was (--force writes all the same)"
            )
        for note in partial.glob(".block-*.json"):
            note.unlink()
        return after

    def _remove_partials(self) -> None:
        for partial in self.out.parent.glob(f".{self.out.name}.*.partial"):
            shutil.rmtree(partial)

    def _record(self, full: dict[str, float], after: dict[str, float], facts: list[dict[str, Any]]) -> Record:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        tasks = {
            task.name: {
                "adapter": stored_path(task.source.adapter, self.out),
                "adapter_hash": task.adapter.identity,
                "data": stored_path(task.source.data, self.out),
                "data_hash": task.calibration.data_hash,
                "bank_key": task.key,
                "tokens": sum(len(sequence.ids) for sequence in task.calibration.fitting),
                "loss_full": full[task.name],
                "loss_quantized": after[task.name],
                "checked": now,
            }
            for task in self.tasks
        }
        base = {"path": stored_path(self.base, self.out), "fingerprint": self.fingerprint}
        seconds = {part: round(spent, 4) for part, spent in sorted(self.clock.seconds.items())}
        return Record(self.out, base, self.settings, tasks, facts, seconds)

    def _step(self, what: str) -> None:
        self.done += 1
        self.place.progress(what, self.done, self.total)

    def _say(self, what: str) -> None:
        self.place.progress(what, self.done, self.total)


def _tokenizer(base: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise QuantizeError(f"{base} holds no tokenizer that can be read; copy it beside the weights") from error


def _held(hessian_KK: Tensor, tokens: float, share: float) -> TaskHessian:
    return TaskHessian(lambda: hessian_KK, tokens, share)
