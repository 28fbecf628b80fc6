"""Grades answers by forward passes through the quantizer's model of blocks, all adapters in shared batches, on a CPU or
a GPU: quick, and without the engine. It decodes nothing, so it serves `--forward-only` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from eval.backend import Ask, BackendError, Graded, check_full
from eval.provenance import code_identity
from inlaid.adapters.adapter import Adapter
from inlaid.adapters.peft import read_adapter
from inlaid.checkpoint import Checkpoint
from inlaid.kv_format import AUTO
from inlaid.model.spec import read_spec
from inlaid.quant import calibration
from inlaid.quant.adapter import attached_to_rows
from inlaid.quant.blocks import BlockModel, Stream
from inlaid.quant.calibration import padded

MAX_TOKENS = 16_384  # of one batch, padding included
LOGIT_ROWS = 1024  # tokens whose logits are in memory at a time


class BlocksBackend:
    """A Backend that grades, in single precision."""

    drafts = True

    def __init__(self, device: str, base: Path, adapters: Mapping[str, Path], kv: str = AUTO.name) -> None:
        check_full(kv, "blocks")
        self._model = BlockModel(Checkpoint(base, None if device == "cpu" else torch.device(device)), device)
        self._adapters: dict[str | None, Adapter | None] = {None: None}
        self.refused: dict[str, str] = {}
        for name, path in adapters.items():
            try:
                self._adapters[name] = read_adapter(path, read_spec(base), torch.float32)
            except (OSError, ValueError, SafetensorError) as error:
                self.refused[name] = str(error)

    def generate(self, asks: Sequence[Ask]) -> list[list[int] | str]:
        if asks:
            raise BackendError("the backend blocks decodes nothing: give --forward-only, or another --backend")
        return []

    @torch.no_grad()
    def grade(self, asks: Sequence[Ask], continuations: Sequence[Sequence[int]]) -> list[Graded]:
        """Grade each continuation's tokens."""
        graded: list[Graded] = [Graded((), ())] * len(asks)
        rows = [
            (at, calibration.Sequence((*ask.prompt, *after), len(ask.prompt)))
            for at, (ask, after) in enumerate(zip(asks, continuations, strict=True))
        ]
        parts = _parts(rows)
        for part in parts:  # rows of one adapter lie side by side
            part.sort(key=lambda row: asks[row[0]].adapter or "")
        streams = self._model.start([padded([sequence for _, sequence in part]) for part in parts])
        for index in range(self._model.num_blocks):
            with self._model.loaded(index) as block:
                for part, stream in zip(parts, streams, strict=True):
                    self._advance(block, index, [asks[at].adapter for at, _ in part], stream)
        with self._model.head():
            for part, stream in zip(parts, streams, strict=True):
                for (at, _), one in zip(part, self._graded(stream), strict=True):
                    graded[at] = one
        return graded

    def _advance(self, block: torch.nn.Module, index: int, names: list[str | None], stream: Stream) -> None:
        ranges = [
            (slice(names.index(name), names.index(name) + names.count(name)), self._adapters[name])
            for name in dict.fromkeys(names)
        ]
        with attached_to_rows(ranges, block, self._model.prefix(index)):
            stream.hidden_BSD = self._model.run(block, index, stream)

    def _graded(self, stream: Stream) -> list[Graded]:
        """Return the grades of each row of a batch that has passed every block."""
        wanted_BS = stream.batch.answer_BS[:, 1:].to(self._model.device)
        hidden_TD, next_T = stream.hidden_BSD[:, :-1][wanted_BS], stream.batch.ids_BS.to(self._model.device)[:, 1:]
        next_T = next_T[wanted_BS]
        chosen_T, first_T = torch.empty(len(next_T)), torch.empty(len(next_T), dtype=torch.bool)
        for start in range(0, len(next_T), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            logprobs_PV = self._model.logits(hidden_TD[part]).float().log_softmax(-1)
            chosen_T[part] = logprobs_PV.gather(1, next_T[part, None])[:, 0].cpu()
            first_T[part] = (logprobs_PV.argmax(-1) == next_T[part]).cpu()
        lengths = wanted_BS.sum(1).tolist()
        return [
            Graded(tuple(chosen.tolist()), tuple(first.tolist()))
            for chosen, first in zip(chosen_T.split(lengths), first_T.split(lengths), strict=True)
        ]

    def close(self) -> None:
        del self._model


def setting(device: str) -> str:
    """Return what decides the backend's numbers."""
    parts = ("quant", "adapters", "model", "checkpoint.py")
    return f"blocks {code_identity(*parts)}, {device.partition(':')[0]}, float32, torch {torch.__version__}"


Part = list[tuple[int, calibration.Sequence]]


def _parts(rows: Part) -> list[Part]:
    """Divide rows into batches of like length."""
    parts: list[Part] = []
    for row in sorted(rows, key=lambda row: len(row[1].ids)):
        if not parts or len(row[1].ids) * (len(parts[-1]) + 1) > MAX_TOKENS:
            parts.append([])
        parts[-1].append(row)
    return parts
