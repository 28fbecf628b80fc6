"""The device's view of the adapters: the flat pool, and the tables of offset, rank and scale by slot and site. The
residency decides where each adapter is; these functions write it down, and list what has to be copied.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
import torch

from inlaid.adapters.adapter import AdapterEntry
from inlaid.adapters.loader import Copy
from inlaid.kernels.backend import MODULES, AdapterPages
from inlaid.model.spec import ModelSpec


def empty_pages(
    spec: ModelSpec, slots: int, pool_elements: int, device: torch.device, dtype: torch.dtype
) -> AdapterPages:
    """Return a pool and tables without any adapter."""
    return AdapterPages(
        pool=_zeros(pool_elements, dtype, device),
        table=torch.zeros(slots, spec.num_sites, 3, dtype=torch.int64, device=device),
        scale=torch.zeros(slots, spec.num_sites, dtype=torch.float32, device=device),
        versions=[0] * slots,
        outputs=torch.full((slots, spec.num_sites, 2), -1) if device.type == "cpu" else None,
    )


def _zeros(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros. On a CPU each page of them takes memory when it is first written: most pools are never full."""
    if device.type != "cpu" or not elements:
        return torch.zeros(elements, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize), dtype=dtype)


def default_pool_elements(spec: ModelSpec, max_resident: int, rank: int = 16) -> int:
    """Return the room for that many adapters of this rank on every linear: the size of a pool if no size is given."""
    per_rank = sum(sum(spec.module_shape(module)) for module in MODULES) * spec.num_layers
    return max_resident * rank * per_rank


def size(entry: AdapterEntry) -> int:
    """Return the elements of an entry, both matrices with their alignment."""
    return entry.end - entry.a_start


def show(pages: AdapterPages, slot: int, entries: Sequence[AdapterEntry], starts: Sequence[int]) -> None:
    """Publish an adapter in the device tables. Kernels follow them blindly: steps wait for layers that are coming."""
    table = np.zeros((pages.table.shape[1], 3), dtype=np.int64)
    if pages.outputs is not None:
        pages.outputs[slot] = -1
    scale = np.zeros(pages.table.shape[1], dtype=np.float32)
    for entry, start in zip(entries, starts, strict=True):
        if entry.site < 0:  # the embedding or the head: the runner asks the store
            continue
        table[entry.site] = start, start + entry.b_start - entry.a_start, entry.rank
        scale[entry.site] = entry.scale
        if entry.changes_outputs:
            assert pages.outputs is not None, "refused when it was read"
            places = [start + at - entry.a_start if at else -1 for at in (entry.out_scale, entry.out_bias)]
            pages.outputs[slot, entry.site] = torch.tensor(places)
    for target_row, row in ((pages.table, table), (pages.scale, scale)):
        host = torch.from_numpy(row)
        if pages.pool.device.type == "cuda":  # from pinned memory the copy does not hold up the step loop
            host = host.pin_memory()
        target_row[slot].copy_(host, non_blocking=True)
    pages.versions[slot] += 1


def clear(pages: AdapterPages, slot: int) -> None:
    """Empty a slot in the tables."""
    pages.table[slot].zero_()
    pages.scale[slot].zero_()
    if pages.outputs is not None:
        pages.outputs[slot] = -1
    pages.versions[slot] += 1


def copies(
    pool: torch.Tensor,
    entries: Sequence[AdapterEntry],
    starts: Sequence[int],
    flat: torch.Tensor,
    num_groups: int,
    layers_per_group: int,
) -> list[list[Copy]]:
    """List the copies that bring an adapter to its place, by layer group, in as few pieces as its extents allow."""
    groups: list[list[Copy]] = [[] for _ in range(num_groups)]
    sites = len(MODULES) * layers_per_group
    for begin, end in _runs(entries, starts, sites):
        start, stop = entries[begin].a_start, entries[end - 1].end
        piece = pool[starts[begin] : starts[begin] + stop - start]
        groups[_group(entries[begin], sites)].append((piece, flat[start:stop]))
    return groups


def _group(entry: AdapterEntry, sites: int) -> int:
    """Return the layer group with which an entry comes: those of the embedding and the head with the first."""
    return max(0, entry.site // sites)


def _runs(entries: Sequence[AdapterEntry], starts: Sequence[int], sites: int) -> list[tuple[int, int]]:
    """Return ranges [begin, end) of entries that lie side by side in the pool as they do in the adapter; each is one
    copy, and stays within one layer group of `sites` sites.
    """
    runs, begin = [], 0
    for index in range(1, len(entries) + 1):
        if (
            index == len(entries)
            or starts[index] != starts[index - 1] + size(entries[index - 1])
            or _group(entries[index], sites) != _group(entries[begin], sites)
        ):
            runs.append((begin, index))
            begin = index
    return runs
