"""Times at which requests are due: one spec, one function from it to sorted seconds.

Used for every stream that does not take its times from a trace.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]
Gaps = Literal["fixed", "poisson", "gamma"]
Process = Literal["burst", "fixed", "poisson", "gamma", "on-off", "ramp", "trace"]


class Arrivals(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`rate` is requests a second; `within` is the process inside on-off windows and along a ramp.

    A gamma process has gaps with coefficient of variation `cv` (1 is Poisson, above is burstier).
    On-off is on for `on_s`, then silent for `off_s`; a ramp goes linearly from `rate` to `end_rate`.
    """

    process: Process = "poisson"
    rate: float = 1.0
    cv: float = 1.0
    on_s: float = 60.0
    off_s: float = 60.0
    end_rate: float | None = None
    within: Gaps = "fixed"

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf or (self.end_rate is not None and not 0 <= self.end_rate < math.inf):
            raise ValueError("rates must be above 0 requests a second (an end_rate may be 0), and finite")
        if not (self.cv > 0 and self.on_s > 0 and self.off_s >= 0):
            raise ValueError("cv and on_s must be above 0, off_s at least 0")
        if self.process == "ramp" and self.end_rate is None:
            raise ValueError("a ramp needs end_rate: the rate it reaches when the stream's duration_s is over")


def arrival_times(
    spec: Arrivals, duration_s: float | None, num_requests: int | None, rng: np.random.Generator
) -> Times:
    """Seconds from the stream's start, sorted; the limit that is reached first ends the stream."""
    if spec.process == "burst":
        return np.zeros(_needed(num_requests, "burst (all at once)", "num_requests"))
    if spec.process == "ramp":
        times = _ramp(spec, _needed(duration_s, "ramp", "duration_s"), rng)
    elif spec.process == "on-off":
        times = _on_off(spec, duration_s, num_requests, rng)
    else:
        assert spec.process != "trace", "a trace brings its own times"
        times = _renewal(spec.process, spec, duration_s, num_requests, rng)
    if duration_s is not None:
        times = times[times < duration_s]
    return times[:num_requests]


Limit = TypeVar("Limit", int, float)


def _needed(value: Limit | None, process: str, name: str) -> Limit:
    if value is None:
        raise ValueError(f"arrival process {process} needs {name}")
    return value


def _unit_gaps(kind: Gaps, cv: float, count: int, rng: np.random.Generator) -> Times:
    """Draw gaps with mean 1."""
    if kind == "fixed":
        return np.ones(count)
    shape = 1.0 if kind == "poisson" else 1 / cv**2
    return rng.gamma(shape, 1 / shape, count)


def _unit_times(kind: Gaps, cv: float, until: float, rng: np.random.Generator) -> Times:
    """Arrivals at rate 1 up to `until`; a fixed process starts at a random phase."""
    parts = [np.array([rng.random() - 1.0])] if kind == "fixed" else [np.zeros(1)]
    while parts[-1][-1] < until:
        block = int(until - parts[-1][-1]) + 64
        parts.append(parts[-1][-1] + np.cumsum(_unit_gaps(kind, cv, block, rng)))
    times = np.concatenate(parts)[1:]
    return times[times < until]


def _renewal(
    kind: Gaps, spec: Arrivals, duration_s: float | None, num_requests: int | None, rng: np.random.Generator
) -> Times:
    if duration_s is not None:
        return _unit_times(kind, spec.cv, duration_s * spec.rate, rng) / spec.rate
    count = _needed(num_requests, kind, "num_requests or duration_s")
    return np.cumsum(_unit_gaps(kind, spec.cv, count, rng)) / spec.rate


def _on_off(spec: Arrivals, duration_s: float | None, num_requests: int | None, rng: np.random.Generator) -> Times:
    """Time runs on while the stream is silent: arrivals that fall in an off window do not happen."""
    period = spec.on_s + spec.off_s
    if duration_s is None:
        count = _needed(num_requests, "on-off", "num_requests or duration_s")
        duration_s = 4 * (count + 64) / spec.rate * period / spec.on_s
    times = _renewal(spec.within, spec, duration_s, None, rng)
    return times[times % period < spec.on_s]


def _ramp(spec: Arrivals, duration_s: float, rng: np.random.Generator) -> Times:
    """Map unit arrivals through the inverse of the expected count r0*t + (r1-r0)*t^2/(2T)."""
    assert spec.end_rate is not None
    first, slope = spec.rate, (spec.end_rate - spec.rate) / duration_s
    counts = _unit_times(spec.within, spec.cv, (spec.rate + spec.end_rate) / 2 * duration_s, rng)
    if abs(slope) < 1e-12:
        return counts / first
    return (np.sqrt(np.maximum(first**2 + 2 * slope * counts, 0)) - first) / slope
