"""The inputs of an eager step as arrays on the host. The runner makes them of a batch; other members of a group get
them through shared memory, array behind array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from inlaid.kernels.arriving import Arriving
from inlaid.kernels.context import ALL_ADAPTERS, NO_ADAPTERS, OnHost, StepContext

_HEADER = 8  # whole numbers: the sizes, and what is known of the decodes


@dataclass(frozen=True)
class EagerStep:
    """A step of S sequences with T tokens. `scored` lists pieces of T, as first row and number of rows, whose logits
    are wanted beside those of `logit_rows`, piece by piece."""

    ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T]
    kv_slots: np.ndarray  # int64 [T]
    table: np.ndarray  # int32 [S, blocks]
    context_lens: np.ndarray  # int32 [S]
    query_lens: np.ndarray  # int32 [S]
    adapter_slots: np.ndarray  # int32 [S]
    logit_rows: np.ndarray  # int64 [L]
    scored: np.ndarray  # int64 [pieces, 2]
    num_decodes: int
    num_drafted: int = 0
    decodes_go_on: bool = False

    def context(self, block_size: int, device: torch.device, arriving: Arriving | None = None) -> StepContext:
        """Return the step's metadata on the device and on the host."""

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        query_lens, lens, slots = (
            tuple(array.tolist()) for array in (self.query_lens, self.context_lens, self.adapter_slots)
        )
        return StepContext(
            ids_T=tensor(self.ids),
            positions_T=tensor(self.positions),
            kv_slots_T=tensor(self.kv_slots),
            block_tables=tensor(self.table),
            context_lens_S=tensor(self.context_lens),
            logit_rows_L=tensor(self.logit_rows),
            block_size=block_size,
            num_decodes=self.num_decodes,
            num_prefills=len(lens) - self.num_decodes,
            adapters=ALL_ADAPTERS if any(slots) else NO_ADAPTERS,
            on_host=OnHost(query_lens, lens, slots, self.decodes_go_on, self.num_drafted),
            arriving=arriving,
        )

    def write(self, memory: np.ndarray) -> int:
        """Write the step into bytes that `read` can read; return their number. ValueError: there is no room."""
        header = np.array([
            len(self.ids), *self.table.shape, len(self.logit_rows), len(self.scored), self.num_decodes,
            self.num_drafted, self.decodes_go_on,
        ])  # fmt: skip
        at = 0
        for array in (header, *self._arrays()):
            end = at + array.nbytes
            if end > len(memory):
                raise ValueError(f"a step of {len(self.ids)} tokens has no room in {len(memory)} bytes")
            memory[at:end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            at = -(-end // 8) * 8
        return at

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return (
            self.ids, self.positions, self.kv_slots, self.logit_rows, self.scored, self.table, self.context_lens,
            self.query_lens, self.adapter_slots,
        )  # fmt: skip

    @classmethod
    def read(cls, memory: np.ndarray) -> EagerStep:
        """Return a step as views of the bytes that hold it."""
        at = 0

        def take(dtype: type[np.generic], *shape: int) -> np.ndarray:
            nonlocal at
            array = np.frombuffer(memory, dtype, int(np.prod(shape)), at).reshape(shape)
            at = -(-(at + array.nbytes) // 8) * 8
            return array

        tokens, sequences, blocks, logits, pieces, num_decodes, num_drafted, go_on = take(np.int64, _HEADER).tolist()
        ids, positions, kv_slots = (take(np.int64, tokens) for _ in range(3))
        logit_rows, scored = take(np.int64, logits), take(np.int64, pieces, 2)
        table = take(np.int32, sequences, blocks)
        context_lens, query_lens, adapter_slots = (take(np.int32, sequences) for _ in range(3))
        return cls(
            ids, positions, kv_slots, table, context_lens, query_lens, adapter_slots, logit_rows, scored, num_decodes,
            num_drafted, bool(go_on),
        )  # fmt: skip


def most_bytes(max_tokens: int, max_rows: int, max_blocks: int) -> int:
    """Return bytes that hold any step of so many tokens and sequences of so many blocks, with drafts or without."""
    return 8 * (_HEADER + 6 * max_tokens + 2 * max_rows + max_rows * max_blocks + 64)
