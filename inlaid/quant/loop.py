"""Block after block: each is loaded once, every task that the bank does not know yet runs through it with its adapter
attached and leaves its Hessians, the tasks' Hessians become one, and the block is solved and written as one file.

Memory holds one block, the Hessians of one block, and the hidden states of the tasks that are new.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlaid.checkpoint import Checkpoint, dequantize, to_tensors
from inlaid.files import remove_unfinished, write_atomically
from inlaid.quant.aggregate import TaskHessian, solve_together
from inlaid.quant.bank import Bank, Entry
from inlaid.quant.calibration import batches
from inlaid.quant.hessian import advance, block_hessians
from inlaid.quant.plan import Plan
from inlaid.quant.replay import Replays, launch
from inlaid.quant.solver import Solution
from inlaid.quant.warm import StoredSolution
from inlaid.tensorfiles import write_tensors

SiteHessians = dict[str, list[TaskHessian]]
Members = dict[str, list[str]]  # the linears of each site
HELD = 0.25  # of a GPU's memory for Hessians that are read from the bank in every round


@dataclass(frozen=True)
class Weights:
    """The weights of the tasks' Hessians: shares that sum to 1, of trace-normalised Hessians or of plain ones."""

    shares_T: Tensor
    by_trace: bool = True


class Progress:
    """Pieces of work done, out of a number that is known from the start."""

    def __init__(self, plan: Plan, bank: Bank, rounds: int) -> None:
        """Count the work of solving all blocks `rounds` times."""
        blocks = plan.model.num_blocks
        new = sum(not entry.complete(blocks) for entry in plan.entries(bank))  # tasks that run through every block
        passes = rounds * len(plan.tasks) if plan.settings.sequential else new
        self.rounds = rounds
        self.done, self.total = 0, 2 + blocks * (rounds + passes)
        self._tell = plan.place.progress

    def step(self, what: str) -> None:
        """Report that a piece of work is done."""
        self.done += 1
        self.say(what)

    def say(self, what: str) -> None:
        """Report what is being worked on."""
        self._tell(what, self.done, self.total)

    def end(self) -> None:
        self._tell("done", self.total, self.total)


class BlockLoop:
    """Fills a folder with solved blocks, one file and one note each. A block that a killed run has left there is taken
    over.
    """

    def __init__(self, plan: Plan, bank: Bank, progress: Progress, stored: StoredSolution | None = None) -> None:
        """Solve every site anew, or, with `stored`, from that solution."""
        self._plan, self._bank, self._progress, self._stored = plan, bank, progress, stored
        self._model, self._settings, self._stopwatch = plan.model, plan.settings, plan.stopwatch
        self._run = launch if plan.place.rest else Replays()  # a job that is to rest does so between its kernels
        self._held: dict[tuple[Path, int, str], Tensor] = {}  # Hessians, where rounds read them again
        self._room = 0
        if self._model.device.type == "cuda" and stored is None and progress.rounds > 1:
            self._room = int(HELD * torch.cuda.get_device_properties(self._model.device).total_memory)

    def fill(self, folder: Path, weights: Weights) -> list[dict[str, Any]]:
        """Solve every block with these weights of the tasks; returns what each site cost."""
        self._start_streams()
        facts: list[dict[str, Any]] = []
        for index in range(self._model.num_blocks):
            shard, note = folder / f"model-block-{index:03d}.safetensors", folder / f".block-{index:03d}.json"
            with self._model.loaded(index) as block:
                if note.exists():
                    self._pass_written(block, index, folder)
                else:
                    tensors, solved = self._solve(block, index, weights)
                    with self._stopwatch.part("writing"):
                        write_tensors(shard, tensors, {"format": "pt"})
                        write_atomically(note, json.dumps(solved).encode())
            facts += json.loads(note.read_text())
            self._progress.step(f"layer {index} solved")
        return facts

    def _start_streams(self) -> None:
        """Start the tasks whose Hessians are still to be made; the others need not travel through the blocks."""
        weight = self._settings.calibration.highlight
        for task, entry in zip(self._plan.tasks, self._plan.entries(self._bank), strict=True):
            task.streams = []
            remove_unfinished(entry.path)
            if self._settings.sequential or not entry.complete(self._model.num_blocks):
                with self._stopwatch.part("forward"):
                    task.streams = self._model.start(batches(task.calibration.fitting, weight))

    def _solve(self, block: nn.Module, index: int, weights: Weights) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        sequential, linears = self._settings.sequential, self._model.linears(index)
        make = self._fresh_hessians if sequential else self._banked_hessians
        sites, members = make(block, index, weights)
        tensors = self._untouched(index, set(linears))
        facts = []
        for site, hessians in sites.items():
            named = {name: linears[name].weight.detach().T.float() for name in members[site]}
            with self._stopwatch.part("solving"):
                solution, fact = self._solution(index, site, named, hessians)
            facts.append(fact)
            start = 0
            for name, weight_KN in named.items():
                with self._stopwatch.part("writing"):
                    packed = solution.columns(start, start + weight_KN.shape[1]).packed(self._settings.grid)
                    tensors |= to_tensors(name, packed)
                start += weight_KN.shape[1]
                if sequential:
                    linears[name].weight.data = dequantize(packed, self._model.dtype).T.contiguous()
        if sequential:
            for task in self._plan.tasks:
                advance(self._model, block, index, task.adapter, task.streams)
        return tensors, facts

    def _solution(
        self, index: int, site: str, weights: dict[str, Tensor], hessians: list[TaskHessian]
    ) -> tuple[Solution, dict[str, Any]]:
        """Return a site's solution, and what it cost."""
        grid, rest, more = self._settings.grid, self._stopwatch.rest, dict[str, float]()
        if self._stored is None:
            weights_KN = torch.cat(list(weights.values()), dim=1)
            solution = solve_together(self._settings.aggregation, weights_KN, hessians, grid, rest, self._run)
        else:
            solution, moved = self._stored.solve(index, site, weights, hessians, grid, rest)
            more = {"moved": moved}
        return solution, {"site": site, "loss": solution.loss, "damping": solution.damping, **more}

    def _pass_written(self, block: nn.Module, index: int, folder: Path) -> None:
        """Move the streams past a block that a killed run had finished."""
        moving = [task for task in self._plan.tasks if task.streams]
        if self._settings.sequential:
            written = Checkpoint(folder)
            for name, linear in self._model.linears(index).items():
                weight_KN = dequantize(written.linear(name), self._model.dtype)
                linear.weight.data = weight_KN.T.contiguous().to(self._model.device)
        for task in moving:
            advance(self._model, block, index, task.adapter, task.streams)
            self._progress.step(f"layer {index}, task {task.name}, resumed")

    def _banked_hessians(self, block: nn.Module, index: int, weights: Weights) -> tuple[SiteHessians, Members]:
        """Return every task's Hessians of a block, read from the bank; those that are not there are made first."""
        entries = self._plan.entries(self._bank)
        for task, entry in zip(self._plan.tasks, entries, strict=True):
            if not task.streams:
                continue
            if entry.has(index):
                advance(self._model, block, index, task.adapter, task.streams)
            else:
                made = block_hessians(self._model, block, index, task.adapter, task.streams, advance=True)
                with self._stopwatch.part("bank"):
                    entry.write(index, made.hessians(), made.members, made.total)
            self._progress.step(f"layer {index}, task {task.name}")
        members = entries[0].members(index)
        shared = list(zip(entries, weights.shares_T.tolist(), strict=True))
        sites = {
            site: [
                TaskHessian(partial(self._read, entry, index, site), entry.tokens(index), share, weights.by_trace)
                for entry, share in shared
            ]
            for site in members
        }
        return sites, members

    def _read(self, entry: Entry, index: int, site: str) -> Tensor:
        """Read a Hessian from the bank, or from the device where rounds before this one left it."""
        key = entry.path, index, site
        if key in self._held:
            return self._held[key]
        with self._stopwatch.part("bank"):
            hessian_KK = entry.read(index, site, self._model.device)
        if hessian_KK.nbytes <= self._room:
            self._room -= hessian_KK.nbytes
            self._held[key] = hessian_KK
        return hessian_KK

    def _fresh_hessians(self, block: nn.Module, index: int, weights: Weights) -> tuple[SiteHessians, Members]:
        """Return every task's Hessians of a block as its quantized predecessors make them."""
        sites: SiteHessians = {}
        members: Members = {}
        for task, share in zip(self._plan.tasks, weights.shares_T.tolist(), strict=True):
            made = block_hessians(self._model, block, index, task.adapter, task.streams, advance=False)
            members = made.members
            for site, hessian_KK in made.hessians().items():
                held = TaskHessian(partial(_itself, hessian_KK), made.total, share, weights.by_trace)
                sites.setdefault(site, []).append(held)
            self._progress.step(f"layer {index}, task {task.name}")
        return sites, members

    def _untouched(self, index: int, linears: set[str]) -> dict[str, Tensor]:
        """Return a block's other tensors (norms, biases), as the base has them."""
        checkpoint, prefix = self._plan.checkpoint, self._model.prefix(index)
        weights = {f"{name}.weight" for name in linears}
        names = [name for name in checkpoint.dense if name.startswith(prefix) and name not in weights]
        return {name: checkpoint.tensor(name) for name in names}


def _itself(hessian_KK: Tensor) -> Tensor:
    return hessian_KK
