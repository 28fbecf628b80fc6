"""What the device knows of the adapters: the flat pool, and the tables that say what of it is whose. The store decides
who is where; these write it down, and say what has to be copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from inlaid.adapters.loader import Copy
from inlaid.adapters.peft import AdapterEntry
from inlaid.kernels.backend import MODULES, AdapterPages
from inlaid.model.spec import ModelSpec


def empty_pages(
    spec: ModelSpec, slots: int, pool_elements: int, device: torch.device, dtype: torch.dtype
) -> AdapterPages:
    """A pool and tables that tell of nothing."""
    return AdapterPages(
        pool=torch.zeros(pool_elements, dtype=dtype, device=device),
        table=torch.zeros(slots, spec.num_sites, 3, dtype=torch.int64, device=device),
        scale=torch.zeros(slots, spec.num_sites, dtype=torch.float32, device=device),
        versions=[0] * slots,
    )


def default_pool_elements(spec: ModelSpec, max_resident: int, rank: int = 16) -> int:
    """Room for that many adapters of this rank on every linear: what a server gets when it names no size."""
    per_rank = sum(sum(spec.module_shape(module)) for module in MODULES) * spec.num_layers
    return max_resident * rank * per_rank


def size(entry: AdapterEntry) -> int:
    return entry.end - entry.a_start


def show(
    pages: AdapterPages, slot: int, entries: Sequence[AdapterEntry], starts: Sequence[int], num_layers: int
) -> None:
    """Let the tables tell of an adapter's first so many layers. What computes follows them blindly; so where steps
    start before an adapter is whole and nobody waits for it, they tell of what has landed only."""
    table = np.zeros((pages.table.shape[1], 3), dtype=np.int64)
    scale = np.zeros(pages.table.shape[1], dtype=np.float32)
    for entry, start in zip(entries, starts, strict=True):
        if entry.site < num_layers * len(MODULES):
            table[entry.site] = start, start + entry.b_start - entry.a_start, entry.rank
            scale[entry.site] = entry.scale
    for target_row, row in ((pages.table, table), (pages.scale, scale)):
        host = torch.from_numpy(row)
        if pages.pool.device.type == "cuda":  # from pinned memory the copy does not hold up the step loop
            host = host.pin_memory()
        target_row[slot].copy_(host, non_blocking=True)
    pages.versions[slot] += 1


def clear(pages: AdapterPages, slot: int) -> None:
    """The tables tell of nothing there."""
    pages.table[slot].zero_()
    pages.scale[slot].zero_()
    pages.versions[slot] += 1


def copies(
    pool: torch.Tensor,
    entries: Sequence[AdapterEntry],
    starts: Sequence[int],
    flat: torch.Tensor,
    num_groups: int,
    layers_per_group: int,
) -> list[list[Copy]]:
    """What to copy where, by layer group; in as few pieces as the pool's free space allows."""
    groups: list[list[Copy]] = [[] for _ in range(num_groups)]
    sites = len(MODULES) * layers_per_group
    for begin, end in _runs(entries, starts, sites):
        start, stop = entries[begin].a_start, entries[end - 1].end
        piece = pool[starts[begin] : starts[begin] + stop - start]
        groups[entries[begin].site // sites].append((piece, flat[start:stop]))
    return groups


def _runs(entries: Sequence[AdapterEntry], starts: Sequence[int], sites: int) -> list[tuple[int, int]]:
    """Entries that lie side by side in the pool as they do in the adapter, [begin, end), to be copied at once; a run
    stays within one layer group of so many sites."""
    runs, begin = [], 0
    for index in range(1, len(entries) + 1):
        if (
            index == len(entries)
            or starts[index] != starts[index - 1] + size(entries[index - 1])
            or entries[index].site // sites != entries[begin].site // sites
        ):
            runs.append((begin, index))
            begin = index
    return runs
