"""Steps that the tests of the CPU's kernels share."""

from __future__ import annotations

import torch

from inlaid.kernels.context import ALL_ADAPTERS, NO_ADAPTERS, OnHost, StepContext
from inlaid.kernels.workspace import FreshMemory

MEMORY = FreshMemory(torch.device("cpu"), torch.float32)


def make_step(
    slots: tuple[int, ...],
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...] = (),
    table: torch.Tensor | None = None,
    block_size: int = 4,
    decodes_go_on: bool = False,
    num_drafted: int = 0,
) -> StepContext:
    """Return a step of a CPU: the adapter slot, tokens and context length of each sequence."""
    tokens = sum(query_lens)
    lens = context_lens or query_lens
    positions = torch.cat([torch.arange(length - n, length) for n, length in zip(query_lens, lens, strict=True)])
    kv_slots = torch.zeros(tokens, dtype=torch.int64)
    if table is not None:
        rows = torch.repeat_interleave(torch.arange(len(query_lens)), torch.tensor(query_lens))
        kv_slots = table[rows, positions // block_size].long() * block_size + positions % block_size
    decodes = 0 if num_drafted else next((i for i, n in enumerate(query_lens) if n > 1), len(query_lens))
    return StepContext(
        ids_T=torch.zeros(tokens, dtype=torch.int64),
        positions_T=positions,
        kv_slots_T=kv_slots,
        block_tables=torch.zeros(len(slots), 1, dtype=torch.int32) if table is None else table,
        context_lens_S=torch.tensor(lens, dtype=torch.int32),
        logit_rows_L=torch.tensor(query_lens).cumsum(0) - 1,
        block_size=block_size,
        num_decodes=decodes,
        num_prefills=len(query_lens) - decodes,
        adapters=ALL_ADAPTERS if any(slots) else NO_ADAPTERS,
        on_host=OnHost(query_lens, lens, slots, decodes_go_on, num_drafted),
    )
