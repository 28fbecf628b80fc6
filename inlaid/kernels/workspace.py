"""A workspace of fresh memory: for steps that run eagerly on a CPU, and for work outside of steps."""

from __future__ import annotations

import torch


class FreshMemory:
    """A Workspace that allocates at each request."""

    side: torch.cuda.Stream | None = None

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self._dtype, device=self._device)

    def fits(self, name: str, size: int) -> bool:
        """Refuse split parts: plain torch reads whole products."""
        return False
