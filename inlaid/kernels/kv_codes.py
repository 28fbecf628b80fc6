"""Keys and values as 8-bit codes: making them, reading them, and the pages of a layer as a CPU reads and writes them.

x = code * scale, with a scale for each token and head (`spec.kv_codes`). Shapes: T tokens, B blocks, G key/value heads,
C head width, P tokens of a block.
"""

from __future__ import annotations

import torch

from inlaid.kernels.backend import LayerCache

LEAST_SCALE, MOST_SCALE = 2.0**-24, 65504.0  # float16's smallest and largest number
KEYS, VALUES = 0, 1


def largest_code(dtype: torch.dtype) -> int:
    """Return the largest code of a type of codes."""
    return 127 if dtype == torch.int8 else 448


def quantize(x_TGC: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [T, G, C] and scales [T, G] as `spec.kv_codes` has it."""
    largest, x = largest_code(dtype), x_TGC.float()
    top = x.abs().amax(dim=-1)
    scale_TG = (top / largest).clamp(LEAST_SCALE, MOST_SCALE).masked_fill_(~torch.isfinite(top), torch.nan).half()
    ratio = (x / scale_TG.float()[..., None]).nan_to_num_(0.0)  # without a scale there is nothing to read
    if dtype == torch.int8:
        ratio = ratio.add_(0.5).floor_()
    return ratio.clamp_(-largest, largest).to(dtype), scale_TG


def write(cache: LayerCache, slots_T: torch.Tensor, k_TGC: torch.Tensor, v_TGC: torch.Tensor) -> None:
    """Write keys and values of tokens to their slots, block * P + place."""
    P, G, C = cache.keys.shape[1:]
    for which, (pages, rows) in enumerate(((cache.keys, k_TGC), (cache.values, v_TGC))):
        if cache.scales is None:
            pages.view(-1, G, C).index_copy_(0, slots_T, rows)
            continue
        codes, scale_TG = quantize(rows, pages.dtype)
        pages.view(torch.int8).view(-1, G, C).index_copy_(0, slots_T, codes.view(torch.int8))
        cache.scales[slots_T // P, :, slots_T % P, which] = scale_TG


def read_blocks(cache: LayerCache, which: int, blocks_B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the keys (`which` 0) or values (1) of blocks, [B, P, G, C]."""
    if cache.scales is None:
        return pages_of(cache, which).index_select(0, blocks_B)
    scale_BGP = cache.scales[..., which].index_select(0, blocks_B)
    return _numbers(_codes(cache, which).index_select(0, blocks_B), cache, scale_BGP.transpose(1, 2), dtype)


def read_slots(cache: LayerCache, which: int, slots_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the keys or values of tokens, [T, G, C]."""
    P, G, C = cache.keys.shape[1:]
    codes = _codes(cache, which).view(-1, G, C).index_select(0, slots_T)
    if cache.scales is None:
        return codes
    return _numbers(codes, cache, cache.scales[slots_T // P, :, slots_T % P, which], dtype)


def pages_of(cache: LayerCache, which: int) -> torch.Tensor:
    """Return the pages of keys (`which` 0) or of values (1), as they are stored."""
    return cache.values if which else cache.keys


def _codes(cache: LayerCache, which: int) -> torch.Tensor:
    """Return pages in a type that torch can gather: float8 cannot be."""
    pages = pages_of(cache, which)
    return pages if cache.scales is None else pages.view(torch.int8)


def _numbers(codes: torch.Tensor, cache: LayerCache, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return code * scale in fp32, rounded to `dtype`; `scale` lacks the last dimension of `codes`."""
    return codes.view(cache.keys.dtype).to(torch.float32).mul_(scale.float()[..., None]).to(dtype)
