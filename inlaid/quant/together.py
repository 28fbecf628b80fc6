"""The gate's question asked of several tasks in one forward pass: each row of a batch computes with its task's adapter.

The base's products, most of the work, are then few and large, and sequences of like length share a batch whatever their
task. Sums are added in another order than task by task, so losses may differ in their last digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from inlaid.adapters.adapter import Adapter
from inlaid.quant import calibration
from inlaid.quant.adapter import attached_to_rows
from inlaid.quant.blocks import BlockModel, Stream
from inlaid.quant.losses import Loss, answer_losses

MAX_TOKENS = 8192  # of one batch, padding included


@dataclass(frozen=True)
class _Rows:
    """The rows of one task in a batch."""

    task: int
    rows: slice


class SharedPass:
    """The sequences of several tasks on their way through the blocks."""

    def __init__(
        self, model: BlockModel, adapters: Sequence[Adapter | None], sequences: Sequence[Sequence[calibration.Sequence]]
    ) -> None:
        self._model, self._adapters = model, adapters
        self._parts = _parts(sequences)
        batches = [calibration.padded([sequence for _, sequence in part]) for part in self._parts]
        self._streams: list[Stream] = model.start(batches)
        self.losses: list[Loss] = []

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int) -> None:
        """Move all sequences past a loaded block."""
        for part, stream in zip(self._parts, self._streams, strict=True):
            rows = [(each.rows, self._adapters[each.task]) for each in _rows_of(part)]
            with attached_to_rows(rows, block, self._model.prefix(index)):
                stream.hidden_BSD = self._model.run(block, index, stream)

    def finish(self) -> None:
        """Set each task's loss; only inside `model.head()`."""
        examples: list[list[tuple[float, int]]] = [[] for _ in self._adapters]
        for part, stream in zip(self._parts, self._streams, strict=True):
            for (task, _), losses_T in zip(part, answer_losses(self._model, stream), strict=True):
                examples[task].append((float(losses_T.sum(dtype=torch.float64)), len(losses_T)))
        self.losses = [Loss(tuple(nats for nats, _ in each), tuple(length for _, length in each)) for each in examples]
        self._streams = []


Part = list[tuple[int, calibration.Sequence]]  # task and sequence of each row, by task


def _parts(sequences: Sequence[Sequence[calibration.Sequence]]) -> list[Part]:
    """Divide all tasks' sequences into batches of like length."""
    rows = [(task, sequence) for task, own in enumerate(sequences) for sequence in own]
    rows.sort(key=lambda row: (len(row[1].ids), row[0], row[1].ids))
    parts: list[Part] = []
    for row in rows:
        if not parts or len(row[1].ids) * (len(parts[-1]) + 1) > MAX_TOKENS:
            parts.append([])
        parts[-1].append(row)
    return [sorted(part, key=lambda row: row[0]) for part in parts]


def _rows_of(part: Part) -> list[_Rows]:
    tasks = [task for task, _ in part]
    return [
        _Rows(task, slice(tasks.index(task), tasks.index(task) + tasks.count(task))) for task in dict.fromkeys(tasks)
    ]
