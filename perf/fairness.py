"""Fairness: how evenly tenants were served, seen from the client. Called by `perf.summary`.

Service of a tenant is input tokens plus twice the output tokens (the prices of VTC); a prompt counts when its
first token arrives, an output token when it arrives. Demand counts a request when it is due.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from perf.records import Record

INPUT_PRICE, OUTPUT_PRICE = 1.0, 2.0
WINDOW_S = 30.0  # half of the window of VTC's service difference
POINTS = 100

Series = npt.NDArray[np.float64]


class Fairness(msgspec.Struct, frozen=True):
    """`jain_*` is 1 when all tenants have the same. `gap` is max - min over tenants of service since the start.

    `difference_*` is VTC's: at each instant the sum over tenants of min(max service - own, |demand - own|),
    in tokens a second over a window of a minute (or a tenth of a short run); max, mean and variance over time.
    """

    tenants: int
    jain_service: float
    jain_satisfied: float
    gap_max: float
    gap_end: float
    difference_max: float
    difference_mean: float
    difference_variance: float


def fairness(records: list[Record], weights: dict[str, float]) -> Fairness:
    tenants = sorted({record.tenant for record in records})
    own = [[r for r in records if r.tenant == tenant] for tenant in tenants]
    scale = [weights.get(tenant, 1.0) for tenant in tenants]
    served = [_events(group, w) for group, w in zip(own, scale, strict=True)]
    wanted = [_demand(group, w) for group, w in zip(own, scale, strict=True)]
    start, end = min(r.due for r in records), max(r.due for r in records)
    end = max(end, start + 1e-3)
    total = np.array([amounts.sum() for _, amounts in served])
    asked = np.array([amounts.sum() for _, amounts in wanted])
    gaps = _gaps(served, np.linspace(start, end, POINTS))
    difference = _difference(served, wanted, start, end)
    return Fairness(
        tenants=len(tenants),
        jain_service=jain(total),
        jain_satisfied=jain(total / np.maximum(asked, 1e-9)),
        gap_max=float(gaps.max()),
        gap_end=float(gaps[-1]),
        difference_max=float(difference.max()),
        difference_mean=float(difference.mean()),
        difference_variance=float(difference.var()),
    )


def jain(values: Series) -> float:
    """Compute Jain's index, (sum x)^2 / (n * sum x^2); 1 when nothing was shared."""
    squares = float((values**2).sum())
    return float(values.sum()) ** 2 / (len(values) * squares) if squares > 0 else 1.0


def _events(records: list[Record], weight: float) -> tuple[Series, Series]:
    """List times and amounts of service, sorted by time."""
    times: list[float] = []
    amounts: list[float] = []
    for record in records:
        stamps = record.token_times()
        if stamps:
            per_chunk = OUTPUT_PRICE * record.output_len / len(stamps)
            times += stamps
            amounts += [INPUT_PRICE * record.input_len + per_chunk] + [per_chunk] * (len(stamps) - 1)
    order = np.argsort(np.array(times), kind="stable")
    return np.array(times)[order], np.array(amounts)[order] / weight


def _demand(records: list[Record], weight: float) -> tuple[Series, Series]:
    ordered = sorted(records, key=lambda record: record.due)
    cost = [INPUT_PRICE * r.input_len + OUTPUT_PRICE * r.planned_output_len for r in ordered]
    return np.array([r.due for r in ordered]), np.array(cost) / weight


def _until(events: tuple[Series, Series], at: Series) -> Series:
    """Sum the amounts up to each instant."""
    total = np.concatenate([np.zeros(1), np.cumsum(events[1])])
    return total[np.searchsorted(events[0], at, side="right")]


def _gaps(served: list[tuple[Series, Series]], at: Series) -> Series:
    levels = np.stack([_until(events, at) for events in served])
    gaps: Series = levels.max(axis=0) - levels.min(axis=0)
    return gaps


def _difference(
    served: list[tuple[Series, Series]], wanted: list[tuple[Series, Series]], start: float, end: float
) -> Series:
    half = min(WINDOW_S, (end - start) / 20)
    at = np.linspace(start + half, end - half, POINTS)
    rates = [_window_rate(events, at, half) for events in served]
    demand = [_window_rate(events, at, half) for events in wanted]
    most = np.stack(rates).max(axis=0)
    terms = [np.minimum(most - r, np.abs(d - r)) for r, d in zip(rates, demand, strict=True)]
    total: Series = np.stack(terms).sum(axis=0)
    return total


def _window_rate(events: tuple[Series, Series], at: Series, half: float) -> Series:
    return (_until(events, at + half) - _until(events, at - half)) / (2 * half)
