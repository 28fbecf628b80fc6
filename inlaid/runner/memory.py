"""The number of KV blocks that fit into the memory of a device. Both runners ask at start-up."""

from __future__ import annotations

import torch

from inlaid.config import ConfigError, EngineConfig
from inlaid.model.kv import KVLayout


def count_blocks(
    config: EngineConfig,
    layout: KVLayout,
    device: torch.device,
    max_model_len: int,
    floor: int = 0,
) -> int:
    """Return the configured number of KV blocks, or how many the memory set aside holds (on a GPU beside `floor`
    blocks for adapters). The longest request must fit."""
    each = layout.shared_bytes if config.cache.unified_memory else layout.block_bytes
    needed = -(-max_model_len // config.cache.block_size) + 1
    if config.cache.num_blocks:
        return config.cache.num_blocks
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = int(free - total * (1 - config.cache.gpu_memory_utilization)) - floor * each
    else:
        room = int(config.cache.cpu_memory_gib * 2**30) // config.tensor_parallel_size
    fitting = room // each
    if fitting < needed:
        raise ConfigError(
            f"{room / 2**30:.2f} GiB for KV hold {max(0, fitting) * config.cache.block_size} tokens, fewer than one "
            f"request of max_model_len {max_model_len} needs; give it more memory or lower max_model_len"
        )
    return min(fitting, needed * max(2, config.scheduler.max_num_seqs))
