"""The rows of a GPU runner: which request has which row, what the device knows of its blocks, how it is sampled.

A request keeps its row from its first step until it is released, so that steps refer to what lies on the device (block
tables, newest tokens) by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from inlaid.engine.request import Request, SamplingParams, Work
from inlaid.runner.sampling import needs_full_sampler


class Rows:
    """`count` rows; the number `count` itself is the row of padding."""

    def __init__(self, count: int, max_blocks: int, block_size: int, key: Callable[[Request], int]) -> None:
        """Start with all rows free; `key` makes the key of a request's noise."""
        self.max_blocks, self.block_size = max_blocks, block_size
        self._key = key
        self.free = list(range(count - 1, -1, -1))
        self.of: dict[str, int] = {}  # by request id
        self.params = SamplingRows(count + 1)
        self._sent = [0] * (count + 1)  # blocks of each row that the device knows

    def release(self, request_id: str) -> None:
        row = self.of.pop(request_id, None)
        if row is not None:
            self.free.append(row)

    def table_updates(self, works: Sequence[Work], stride: int) -> tuple[list[int], list[int]]:
        """Give new requests their rows; return the blocks that the device has not been told of: places in the flat
        tables, and values. A block of the scheduler is number block * stride in the caches."""
        places: list[int] = []
        values: list[int] = []
        for work in works:
            request = work.request
            row = self.of.get(request.id)
            if row is None:
                row = self._admit(request)
            known, needed = self._sent[row], -(-(work.start + work.num_tokens) // self.block_size)
            if needed > known:
                first = row * self.max_blocks
                places.extend(range(first + known, first + needed))
                values.extend(block * stride for block in request.blocks[known:needed])
                self._sent[row] = needed
        return places, values

    def _admit(self, request: Request) -> int:
        row = self.free.pop()
        self.of[request.id] = row
        self._sent[row] = 0
        self.params.set(row, request.params, self._key(request))
        return row


class SamplingRows:
    """The sampling parameters of each row's request, set once when it gets its row."""

    def __init__(self, rows: int) -> None:
        self.keys = np.zeros(rows, np.int32)
        self.top_k = np.zeros(rows, np.int32)
        self.temperature = np.zeros(rows, np.float32)
        self.top_p = np.ones(rows, np.float32)
        self.min_p = np.zeros(rows, np.float32)
        self.special = [False] * rows  # asks for more than the sampling kernels offer

    def set(self, row: int, params: SamplingParams, key: int) -> None:
        self.keys[row] = key - (1 << 32) if key >> 31 else key
        self.top_k[row] = max(0, params.top_k)
        self.temperature[row] = 0.0 if params.greedy else params.temperature
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.special[row] = needs_full_sampler(params)
