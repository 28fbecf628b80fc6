"""The KV cache of a model in memory: the bytes of a block, pages of a device's own, and pages in memory that is shared
with adapters. The runners call it; which form keys and values have is `kv_format.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from inlaid.config import CacheConfig, ConfigError
from inlaid.kernels.backend import LayerCache
from inlaid.kv_format import AUTO, FP8, INT8, SCALE_BYTES, KVFormat, kv_format
from inlaid.model.spec import ModelSpec

KVCache = list[LayerCache]  # per layer

_CODES: Mapping[str, torch.dtype] = MappingProxyType({FP8.name: torch.float8_e4m3fn, INT8.name: torch.int8})


@dataclass(frozen=True)
class KVLayout:
    """The sizes of a model's KV cache. `dtype` is the compute type."""

    spec: ModelSpec
    block_size: int
    dtype: torch.dtype
    format: KVFormat = AUTO

    def __post_init__(self) -> None:
        if self.format.is_coded and self.spec.head_dim % 4:
            raise ConfigError(
                f"--kv-cache-dtype {self.format.name}: the model's heads of {self.spec.head_dim} are no multiple of 4; "
                "use auto"
            )

    @classmethod
    def of(cls, spec: ModelSpec, config: CacheConfig, dtype: torch.dtype) -> KVLayout:
        """Return the layout that a configuration names."""
        return cls(spec, config.block_size, dtype, kv_format(config.kv_cache_dtype))

    @property
    def token_bytes(self) -> int:
        """Bytes of a token over all layers."""
        spec = self.spec
        return spec.num_layers * spec.num_kv_heads * self.format.head_bytes(spec.head_dim, self.dtype.itemsize)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block over all layers."""
        return self.block_size * self.token_bytes

    @property
    def number(self) -> torch.dtype:
        """The type of a stored number."""
        return _CODES.get(self.format.name, self.dtype)

    def pages(self, num_blocks: int, device: torch.device) -> KVCache:
        """Return zeroed pages for every layer: what a padded read touches must be finite."""
        heads = self.spec.num_kv_heads
        shape = (num_blocks, self.block_size, heads, self.spec.head_dim)

        def zeros() -> torch.Tensor:
            return torch.zeros(shape, device=device, dtype=self.number)

        def scales() -> torch.Tensor | None:
            if not self.format.is_coded:
                return None
            return torch.zeros(num_blocks, heads, self.block_size, 2, device=device, dtype=torch.float16)

        return [LayerCache(zeros(), zeros(), scales()) for _ in range(self.spec.num_layers)]

    # Memory shared with adapters: see runner/unified.py.

    @property
    def stride(self) -> int:
        """Micro-blocks of a block: keys and values of each layer, and room for all scales."""
        layers = self.spec.num_layers
        scales = -(-layers * 2 * SCALE_BYTES // self.spec.head_dim) if self.format.is_coded else 0
        return 2 * layers + scales

    @property
    def shared_bytes(self) -> int:
        """Bytes of a block of shared memory."""
        return self.stride * self._micro_numbers * self.number.itemsize

    @property
    def shared_elements(self) -> int:
        """Elements of the compute type in a block of shared memory."""
        return self.shared_bytes // self.dtype.itemsize

    @property
    def _micro_numbers(self) -> int:
        return self.block_size * self.spec.num_kv_heads * self.spec.head_dim

    def shared_pages(self, memory: torch.Tensor, num_blocks: int) -> KVCache:
        """Return pages in memory of `num_blocks` times `shared_elements`: block b is number b * `stride` in each."""
        spec, stride = self.spec, self.stride
        shape = (num_blocks * stride, self.block_size, spec.num_kv_heads, spec.head_dim)
        micro = memory.view(self.number).view(shape)
        return [
            LayerCache(micro[2 * layer :], micro[2 * layer + 1 :], self._shared_scales(memory, num_blocks, layer))
            for layer in range(spec.num_layers)
        ]

    def _shared_scales(self, memory: torch.Tensor, num_blocks: int, layer: int) -> torch.Tensor | None:
        """Return the scales of a layer, which lie behind the keys and values of all layers of a block."""
        if not self.format.is_coded:
            return None
        heads, size = self.spec.num_kv_heads, self.block_size
        between = self._micro_numbers // SCALE_BYTES  # from micro-block to micro-block
        first = 2 * self.spec.num_layers * between + layer * heads * size * 2
        shape = ((num_blocks - 1) * self.stride + 1, heads, size, 2)
        return memory.view(torch.float16).as_strided(shape, (between, 2 * size, 2, 1), first)
