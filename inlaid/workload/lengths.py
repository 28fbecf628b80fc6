"""Numbers of tokens in and out: one spec, one function that draws them."""

from __future__ import annotations

import math
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


class ScaledLengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Log-normal lengths that differ by tenant, scaled so that all of a workload's together have the given mean.

    A tenant's median is exp(`log_median` + N(0, `tenant_sigma`)), its spread `sigma`; lengths are clipped to low..high.
    """

    log_median: float
    sigma: float
    mean: float
    tenant_sigma: float = 0.3
    low: int = 2
    high: int = 1023

    def clip(self, value: float) -> int:
        return min(self.high, max(self.low, round(value)))

    def scale(self, values: list[float]) -> list[int]:
        """Multiply by the factor that gives the clipped values the wanted mean, and clip."""
        low, high = 1e-3, 1e3
        for _ in range(60):
            middle = math.sqrt(low * high)
            below = sum(self.clip(v * middle) for v in values) < self.mean * len(values)
            low, high = (middle, high) if below else (low, middle)
        return [self.clip(value * low) for value in values]
