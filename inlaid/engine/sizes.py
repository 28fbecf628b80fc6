"""Sizes of steps, counted for /metrics."""

from __future__ import annotations

from bisect import bisect_left

STEP_SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)  # tokens; vLLM's buckets


class StepSizes:
    """Counts of steps by their size: at most so many tokens, and more than the size before."""

    def __init__(self) -> None:
        self._counts = [0] * (len(STEP_SIZES) + 1)

    def add(self, num_tokens: int) -> None:
        """Count a step."""
        self._counts[bisect_left(STEP_SIZES, num_tokens)] += 1

    def stats(self) -> dict[str, float]:
        """Return the counts by size; larger steps are left out."""
        return {f"steps_of_{size}": count for size, count in zip(STEP_SIZES, self._counts, strict=False)}
