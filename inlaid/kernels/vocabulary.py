"""Adapters of the embedding and the output head: a low-rank product, or rows of the weight replaced. In plain torch on
every device, over all rows of a step with those of other adapters masked, so that nothing waits for the device. A step
with such an adapter is never captured in a graph.

Shapes: T tokens of a step, L rows whose logits are wanted, V vocabulary, D model width, R rank, n replaced rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlaid.kernels.context import StepContext


@dataclass(frozen=True)
class LowRank:
    """weight += scale * (B A) of the embedding, transposed: A [R, V], B [D, R]; or of the head: A [R, D], B [V, R]."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Replaced:
    """Rows [n, D] in the place of those of `tokens_n`; None: of all tokens."""

    tokens_n: Tensor | None
    rows_nD: Tensor


Change = LowRank | Replaced


@dataclass(frozen=True)
class VocabularyChange:
    """The changes by the adapter of a slot."""

    slot: int
    embedding: Change | None
    head: Change | None


@dataclass(frozen=True)
class Vocabulary:
    """The changes of a step, and the adapter slot of each of its tokens."""

    changes: Sequence[VocabularyChange]
    slots_T: Tensor

    def embed(self, step: StepContext, residual_TD: Tensor) -> None:
        """Change the embeddings of the step's tokens."""
        ids_T = tokens_of(step)
        for change in self.changes:
            if change.embedding is not None:
                mine_T1 = (self.slots_T == change.slot)[:, None]
                residual_TD.copy_(_embedded(change.embedding, ids_T, residual_TD, mine_T1))

    def head(self, hidden_LD: Tensor, logits_LV: Tensor, rows_L: Tensor) -> None:
        """Change the logits of these rows of T."""
        slots_L = self.slots_T.index_select(0, rows_L)
        for change in self.changes:
            change_logits(change.head, hidden_LD, logits_LV, (slots_L == change.slot)[:, None])


def head_of(vocabulary: Vocabulary | None, slot: int) -> Change | None:
    """Return what the adapter of a slot does to the head."""
    changes = () if vocabulary is None else vocabulary.changes
    return next((change.head for change in changes if change.slot == slot), None)


def tokens_of(step: StepContext) -> Tensor:
    """Return the step's token ids, those included that only the device knows."""
    device = step.on_device
    if device is None:
        return step.ids_T
    sources_T = device.sources_T.long()
    newest_T = device.newest_R.index_select(0, sources_T.clamp(min=0))
    return torch.where(sources_T >= 0, newest_T.long(), step.ids_T.long())


def change_logits(change: Change | None, hidden_LD: Tensor, logits_LV: Tensor, mine_L1: Tensor | None = None) -> None:
    """Change the logits of the rows that are marked, or of all."""
    if change is None:
        return
    if isinstance(change, LowRank):
        delta_LV = ((hidden_LD @ change.a.T) @ change.b.T).mul_(change.scale)
        logits_LV.add_(delta_LV if mine_L1 is None else delta_LV.masked_fill_(~mine_L1, 0.0))
        return
    new_Ln = hidden_LD @ change.rows_nD.T
    if change.tokens_n is None:
        logits_LV.copy_(new_Ln if mine_L1 is None else torch.where(mine_L1, new_Ln, logits_LV))
        return
    if mine_L1 is not None:
        new_Ln = torch.where(mine_L1, new_Ln, logits_LV.index_select(1, change.tokens_n))
    logits_LV.index_copy_(1, change.tokens_n, new_Ln)


def _embedded(change: Change, ids_T: Tensor, residual_TD: Tensor, mine_T1: Tensor) -> Tensor:
    if isinstance(change, LowRank):
        delta_TD = (change.a.index_select(1, ids_T).T @ change.b.T) * change.scale
        return residual_TD + delta_TD.masked_fill_(~mine_T1, 0.0)
    if change.tokens_n is None:
        return torch.where(mine_T1, change.rows_nD.index_select(0, ids_T), residual_TD)
    same_Tn = ids_T[:, None] == change.tokens_n
    replaced_TD = change.rows_nD.index_select(0, same_Tn.int().argmax(1))
    return torch.where(mine_T1 & same_Tn.any(1, keepdim=True), replaced_TD, residual_TD)
