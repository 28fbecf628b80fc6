"""StepContext: everything that the transformer may know about a step, as an argument.

The runner fills it; layers and kernels read it. Tensors are on the device and may be views of fixed buffers (a graph
replays over them). Plain integers are known on the host before the launch, so code may be chosen by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from inlaid.kernels.arriving import Arriving
    from inlaid.kernels.lora_triton import Segments
    from inlaid.kernels.vocabulary import Vocabulary

NO_ADAPTERS, ATTENTION_ADAPTERS, ALL_ADAPTERS = 0, 1, 2  # levels: the linears that may have adapters in a step
VOCABULARY_ADAPTERS = 3  # and the embedding or the head, which no graph has


@dataclass(frozen=True)
class OnHost:
    """The sequences of an eager step as host integers, for kernels that plan on the host."""

    query_lens: tuple[int, ...]  # tokens of each sequence in this step
    context_lens: tuple[int, ...]  # tokens of each sequence including this step's
    adapter_slots: tuple[int, ...]  # of each sequence
    decodes_go_on: bool = False  # the decodes are those of the step before, in order, each further by what it accepted
    num_drafted: int = 0  # in a step with drafts: the first sequences, all decodes, with a draft or without


@dataclass(frozen=True)
class OnDevice:
    """The inputs of kernels that plan nothing on the host, so that one captured graph serves every batch of its size.

    Padding tokens have id 0, padding sequences length 0; both write to KV block 0, which no request reads."""

    sources_T: torch.Tensor  # int32: the row whose newest token this is, or -1: `ids_T` holds the token
    newest_R: torch.Tensor  # int32: the newest token of each row, sampled by an earlier step
    table_rows_S: torch.Tensor  # int32: the sequence's row in `block_tables`
    starts_P1: torch.Tensor  # int32: where the tokens of each prefill start in T; the last entry is their end
    tiles_2N: torch.Tensor  # int32: prefill and first query of each query tile; prefill -1: no tile
    adapter_slots_T: torch.Tensor  # int32: 0 is no adapter
    segments: Segments
    token_rows_T: torch.Tensor | None = (
        None  # int32, with few queries: the row in `block_tables` of each token's sequence
    )
    leaders_T: torch.Tensor | None = None  # int32, with few queries: the first token in T of each token's sequence


@dataclass
class StepContext:
    """One step over S sequences with T tokens; the first `num_decodes` sequences have one token each.

    An eager step on a CPU fills `on_host`, a step on a GPU `on_device`. `attention_plan` and `lora_plan` are what the
    backends derive at the start of the forward pass."""

    ids_T: torch.Tensor
    positions_T: torch.Tensor  # each token's position in its sequence
    kv_slots_T: torch.Tensor  # block * block_size + offset: where the token's key and value go
    block_tables: torch.Tensor  # int32 [rows, blocks]: the blocks of each sequence, padded with block 0
    context_lens_S: torch.Tensor  # int32: tokens of the sequence including this step's
    logit_rows_L: torch.Tensor  # rows of T whose logits are wanted

    block_size: int
    num_decodes: int
    num_prefills: int
    adapters: int = NO_ADAPTERS  # the level
    few_queries: int = 0  # on a GPU: the most tokens of each prefill where they are few; 0: any number
    on_host: OnHost | None = None
    on_device: OnDevice | None = None
    arriving: Arriving | None = None  # adapters of this step that are still coming; never in a captured step

    vocabulary: Vocabulary | None = None  # adapters of the embedding and the head; never in a captured step

    attention_plan: Any = None
    lora_plan: Any = None

    @property
    def num_tokens(self) -> int:
        return self.positions_T.shape[0]
