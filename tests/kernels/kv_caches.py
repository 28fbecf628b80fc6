"""Caches of 8-bit codes that the tests of several kernels share."""

from __future__ import annotations

import torch

from inlaid.kernels.backend import LayerCache
from inlaid.kernels.kv_codes import largest_code, quantize

CODES = (torch.int8, torch.float8_e4m3fn)


def coded(keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> LayerCache:
    """Return pages of numbers [N, P, G, C] as codes. A token with a number that is not finite gets a scale of NaN."""
    N, P, G, C = keys.shape
    made = [quantize(pages.reshape(N * P, G, C), dtype) for pages in (keys, values)]
    scales = torch.stack([scale.view(N, P, G).transpose(1, 2) for _, scale in made], dim=-1)
    return LayerCache(*(codes.view(N, P, G, C) for codes, _ in made), scales.contiguous())


def zeros(blocks: int, page: int, groups: int, width: int, dtype: torch.dtype, device: str = "cpu") -> LayerCache:
    """Return pages without a token."""
    pages = [torch.zeros(blocks, page, groups, width, dtype=torch.int8, device=device).view(dtype) for _ in "kv"]
    return LayerCache(*pages, torch.zeros(blocks, groups, page, 2, dtype=torch.float16, device=device))


def numbers(cache: LayerCache) -> list[torch.Tensor]:
    """Return keys and values [N, P, G, C] in fp32."""
    assert cache.scales is not None
    return [cache[w].float() * cache.scales[..., w].float().transpose(1, 2)[..., None] for w in (0, 1)]


def close(got: LayerCache, want: LayerCache) -> None:
    """Compare caches whose tokens were computed in other orders: a few codes may be the next ones."""
    assert got.scales is not None
    assert want.scales is not None
    torch.testing.assert_close(got.scales.float(), want.scales.float(), rtol=2e-3, atol=1e-7)
    for which, (a, b) in enumerate(zip(numbers(got), numbers(want), strict=True)):
        scale = want.scales[..., which].float().transpose(1, 2)[..., None]
        rounding = largest_code(want.keys.dtype) * scale * 3e-3 + 1e-7
        next_code = scale if want.keys.dtype == torch.int8 else b.abs() / 8  # e4m3 has 3 bits behind the first
        apart = (a - b).abs()
        assert (apart <= next_code + rounding).all()
        assert (apart > rounding).float().mean() < 0.02
