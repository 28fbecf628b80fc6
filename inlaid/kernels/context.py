"""StepContext: everything a layer may know about the step, as an argument. The runner fills it; layers and kernels
read it. Tensors are on the device and may be fixed buffers (a graph replays over them); the plain integers are what
the host knows before launch and may choose code by. Plans are what backends derive once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class StepContext:
    """One step over S sequences with T tokens; the first `num_decodes` sequences have one token each."""

    positions_T: torch.Tensor  # int64: each token's position in its sequence
    kv_slots_T: torch.Tensor  # int64: block * block_size + offset where its key and value go
    block_tables_SB: torch.Tensor  # int32: the sequence's blocks, padded with block 0
    context_lens_S: torch.Tensor  # int32: tokens of the sequence including this step's
    query_starts_S1: torch.Tensor  # int32: where each sequence's tokens start in T; the last entry is T
    logit_rows_L: torch.Tensor  # int64: rows of T whose logits are wanted
    adapter_slots_T: torch.Tensor  # int32: 0 is no adapter

    block_size: int
    num_decodes: int
    max_context_len: int
    query_lens: tuple[int, ...]  # per sequence
    context_lens: tuple[int, ...]
    adapter_slots: tuple[int, ...]  # per sequence
    has_adapters: bool
    decodes_go_on: bool = False  # the decodes are those of the step before, in order, each one token further

    attention_plan: Any = None
    lora_plan: Any = None

    @property
    def num_tokens(self) -> int:
        return self.positions_T.shape[0]
