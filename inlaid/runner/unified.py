"""KV blocks and adapter pages in one piece of memory (`--unified-memory`).

The memory is block after block; a block holds its tokens' keys and values of all layers, one after the other, as
2 x layers micro-blocks. Layer l's keys are the micro-blocks from 2l on, seen as a cache of their own, so that block b
of the scheduler is number b x 2 x layers in it for every layer: kernels need not know. With 8-bit codes the scales of
all layers follow in further micro-blocks (`model/kv.py`). The adapter pool is the same memory as one flat tensor.

    block:   0         1 ... F             F+1 ... M                         M+1 ... N-1
             scratch   adapters' floor     KV's, or lent to adapters         KV's floor

Each side always has its floor. What lies between belongs to the KV cache, which lends blocks that nobody uses; it gets
them back when it runs short, at the cost of idle adapters. The block pool (host) and the adapter store ask each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inlaid.adapters.adapter import ALIGNMENT
from inlaid.adapters.store import AdapterStore
from inlaid.config import CacheConfig, ConfigError
from inlaid.engine.kv_cache import BlockPool
from inlaid.model.kv import KVCache, KVLayout


@dataclass(frozen=True)
class Unified:
    """Shared memory as a runner needs it."""

    cache: KVCache
    stride: int  # micro-blocks in a block
    pool: BlockPool


def floor_blocks(store: AdapterStore, layout: KVLayout) -> int:
    """Return the blocks of the adapters' floor."""
    return -(-store.floor // layout.shared_elements)


def unify(
    layout: KVLayout,
    config: CacheConfig,
    num_kv_blocks: int,
    max_model_len: int,
    store: AdapterStore,
    device: torch.device,
) -> Unified:
    """Return memory for `num_kv_blocks` (scratch included) and the adapters' floor; move the store into it."""
    size, unit = layout.block_size, layout.shared_elements
    if unit % ALIGNMENT:
        raise ConfigError(f"unified memory needs KV blocks of a multiple of {ALIGNMENT} elements, not {unit}")
    first = 1 + floor_blocks(store, layout)
    total = first + num_kv_blocks - 1
    floor = min(num_kv_blocks - 1, max(config.min_kv_blocks, -(-max_model_len // size)))
    with torch.inference_mode(False):  # adapters are copied into it outside of inference
        memory = torch.zeros(total * unit, dtype=layout.dtype, device=device)
    pool = BlockPool(total, size, first=first, floor=floor, borrower=store)
    store.move_into(memory, unit, first, pool)
    return Unified(layout.shared_pages(memory, total), layout.stride, pool)
