"""Losses of a task's answers, example by example, and how certain their mean is. The gate compares them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from inlaid.quant.blocks import BlockModel, Stream


@dataclass(frozen=True)
class Loss:
    """Nats of each example's answer, and its tokens. Examples are in the order of their length and ids."""

    nats: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Return nats a token, of all tokens alike."""
        return sum(self.nats) / max(1, sum(self.tokens)) if self.nats else math.nan

    @property
    def error(self) -> float:
        """Return the standard error of the mean, over examples."""
        return _error(self.nats, self.tokens)

    def error_beside(self, other: Loss) -> float:
        """Return the standard error of the difference of two means over the same examples, which differ much more from
        each other than one does under two bases; 0 where the other's examples are not known."""
        if self.tokens != other.tokens:
            return 0.0
        return _error([mine - theirs for mine, theirs in zip(self.nats, other.nats, strict=True)], self.tokens)


def recorded(task: Mapping[str, Any]) -> Loss:
    """Return a task's loss as its record holds it; records of former versions have its mean alone."""
    if "nats" not in task:
        return Loss((task["loss_quantized"],), (1,))
    return Loss(tuple(task["nats"]), tuple(task["answer_tokens"]))


def answer_losses(model: BlockModel, stream: Stream) -> list[Tensor]:
    """Return the losses of the answer's tokens, a tensor for each row of a stream that has passed every block."""
    wanted_BS = stream.batch.answer_BS[:, 1:].to(model.device)
    hidden_TD = stream.hidden_BSD[:, :-1][wanted_BS.to(stream.hidden_BSD.device)]
    targets_T = stream.batch.ids_BS.to(model.device)[:, 1:][wanted_BS]
    lengths = stream.batch.answer_BS[:, 1:].sum(1).tolist()
    return list(model.losses(hidden_TD, targets_T).cpu().split_with_sizes(lengths))


def _error(nats: list[float] | tuple[float, ...], tokens: tuple[int, ...]) -> float:
    """Return the standard error of sum(nats) / sum(tokens), a ratio of sums over examples; 0 for a single one."""
    count, total = len(nats), sum(tokens)
    if count < 2 or not total:
        return 0.0
    mean = sum(nats) / total
    squares = sum((each - mean * length) ** 2 for each, length in zip(nats, tokens, strict=True))
    return math.sqrt(squares * count / (count - 1)) / total
