"""The form of keys and values in the KV cache (`--kv-cache-dtype`), and the one place that knows the bytes of a token.

auto        numbers of the compute type
fp8, int8   codes of one byte. Each token has, for each key/value head, a scale of its key and one of its value, in
            float16: a value is its code times its scale

A scale for each token, not for each block, lets a token be added without touching those before it, so that chunks,
prefixes and preempted requests get the same codes whatever else is in the block.
"""

from __future__ import annotations

from dataclasses import dataclass

from inlaid.config import ConfigError

SCALE_BYTES = 2


@dataclass(frozen=True)
class KVFormat:
    """One form of keys and values. `largest` is the largest code; 0: there are no codes."""

    name: str
    largest: int = 0

    @property
    def is_coded(self) -> bool:
        return self.largest > 0

    def head_bytes(self, width: int, compute_bytes: int) -> int:
        """Return the bytes of a token's key and value of one head of `width` numbers."""
        return 2 * (width + SCALE_BYTES) if self.is_coded else 2 * width * compute_bytes


AUTO, FP8, INT8 = KVFormat("auto"), KVFormat("fp8", 448), KVFormat("int8", 127)


def kv_format(name: str) -> KVFormat:
    """Return the format that a setting names. ConfigError: there is none of this name."""
    if name == "fp8_e4m3":  # vLLM's other name for it
        return FP8
    for known in (AUTO, FP8, INT8):
        if known.name == name:
            return known
    if name == "fp8_e5m2":
        raise ConfigError(
            "--kv-cache-dtype fp8_e5m2: it keeps 2 bits behind the leading one where fp8 (e4m3) keeps 3, and its wider "
            "range is of no use to numbers that have a scale for each token and head; use fp8"
        )
    raise ConfigError(f"--kv-cache-dtype {name}: give one of auto, fp8 (or fp8_e4m3), int8")
