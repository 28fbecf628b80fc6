"""How many tokens go in and come out. Called by `perf.workload`."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

LengthKind = Literal["fixed", "uniform", "lognormal", "trace"]


class Lengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`fixed` is `value`; `uniform` is low..high, both included; `lognormal` has the given median and sigma;
    `trace` takes the row's own length. Everything is clipped to low..high."""

    kind: LengthKind = "fixed"
    value: int = 128
    low: int = 1
    high: int = 1_000_000
    median: float = 128.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError("lengths need 1 <= low <= high")
        if not (self.value >= 1 and self.median > 0 and self.sigma >= 0):
            raise ValueError("lengths need value >= 1, median > 0, sigma >= 0")


def draw_lengths(spec: Lengths, count: int, rng: np.random.Generator) -> list[int]:
    """Lengths for `count` requests (`trace` rows bring their own)."""
    assert spec.kind != "trace", "a trace brings its own lengths"
    if spec.kind == "fixed":
        drawn = np.full(count, spec.value)
    elif spec.kind == "uniform":
        drawn = rng.integers(spec.low, spec.high + 1, count)
    else:
        drawn = np.rint(rng.lognormal(np.log(spec.median), spec.sigma, count)).astype(np.int64)
    return [int(n) for n in np.clip(drawn, spec.low, spec.high)]
