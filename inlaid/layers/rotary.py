"""Rotary position embedding: the frequencies of each scaling type, and the table of cosines and sines by
position. The model builds it from its spec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RopeSpec:
    """The mapping from positions to angles. `kind`: default, linear, dynamic, llama3 or yarn.

    Dynamic scaling changes nothing up to the trained length, and longer contexts are not offered, so it equals default
    here."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> torch.Tensor:
    """Return [C / 2] angular speeds, in fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    base = 1.0 / (spec.theta**exponents)
    if spec.kind in ("default", "dynamic"):
        return base
    if spec.kind == "linear":
        return base / spec.factor
    if spec.kind == "llama3":
        return _llama3(base, spec)
    if spec.kind == "yarn":
        return _yarn(base, spec, head_dim)
    raise ValueError(f"rope scaling type {spec.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")


def amplitude(spec: RopeSpec) -> float:
    """Return the factor of cosines and sines (yarn's attention temperature)."""
    if spec.kind != "yarn":
        return 1.0
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return _mscale(spec.factor, spec.mscale) / _mscale(spec.factor, spec.mscale_all_dim)
    return _mscale(spec.factor, 1.0)


class Rotary:
    """The table [max_len, C] of cosines and sines; both halves of a head share their angles."""

    def __init__(self, spec: RopeSpec, head_dim: int, max_len: int, device: torch.device, dtype: torch.dtype) -> None:
        positions = torch.arange(max_len, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(spec, head_dim))
        angles = torch.cat((angles, angles), dim=1)
        scale = amplitude(spec)
        self.cos = (angles.cos() * scale).to(device=device, dtype=dtype)
        self.sin = (angles.sin() * scale).to(device=device, dtype=dtype)


def _llama3(base: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """Slow long wavelengths by `factor`, keep short ones, blend those between."""
    wavelength = 2 * math.pi / base
    longest = spec.original_max_len / spec.low_freq_factor
    shortest = spec.original_max_len / spec.high_freq_factor
    blend = (spec.original_max_len / wavelength - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    between = (1 - blend) * base / spec.factor + blend * base
    return torch.where(wavelength > longest, base / spec.factor, torch.where(wavelength < shortest, base, between))


def _yarn(base: torch.Tensor, spec: RopeSpec, head_dim: int) -> torch.Tensor:
    """Keep the speed of dimensions that turn often, interpolate slow ones, with a linear ramp between."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(spec.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return base / spec.factor * ramp + base * (1 - ramp)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
