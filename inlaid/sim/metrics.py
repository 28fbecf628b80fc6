"""Figures from a simulation's records.

The first group is defined as in VTC's artifact, so that its published tables can stand beside ours: a request's service
is spread evenly from its first token to its last, and rates are means over a minute around t. The exact figures, from
the ledger's own history, are in Outcome.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from inlaid.sim.request_log import RequestRecord
from inlaid.sim.simulate import Outcome

Series = npt.NDArray[np.float64]
HALF_WINDOW = 30.0
WARM_UP = 30.0


def service_of(record: RequestRecord) -> float:
    """Return the service of a request: 1 for a prompt token, 2 for an output token."""
    return record.prompt_len + 2.0 * record.output_len


def rates(records: Sequence[RequestRecord], times: Series, of: str = "service") -> Series:
    """Compute rates in the minute around each time: `service` delivered, output `tokens`, or `demand` sent."""
    total = np.zeros(len(times))
    low, high = times - HALF_WINDOW, times + HALF_WINDOW
    for record in records:
        if of == "demand":
            total += np.where((low <= record.arrival) & (record.arrival < high), service_of(record), 0.0)
        elif record.first_token is not None and record.finish is not None:
            amount = service_of(record) if of == "service" else float(record.output_len)
            span = max(record.finish - record.first_token, 1e-9)
            inside = np.minimum(high, record.finish) - np.maximum(low, record.first_token)
            total += np.clip(inside, 0.0, span) * (amount / span)
    return total / (2 * HALF_WINDOW)


def by_tenant(records: Sequence[RequestRecord]) -> dict[str, list[RequestRecord]]:
    groups: dict[str, list[RequestRecord]] = {}
    for record in sorted(records, key=lambda record: record.tenant):
        groups.setdefault(record.tenant, []).append(record)
    return groups


def difference(records: Sequence[RequestRecord], duration: float, weights: Mapping[str, float]) -> Series:
    """Compute VTC's service difference at 19 times.

    It is the sum over clients of how far each is behind the best served, or behind its own demand if that is nearer,
    both over its weight. Refused requests are not part of the demand.
    """
    times = np.array([duration / 20 * 0.95 * i for i in range(1, 20)]) + WARM_UP
    groups = by_tenant([record for record in records if not record.refused])
    served = np.array([rates(group, times) / weights.get(tenant, 1.0) for tenant, group in groups.items()])
    asked = np.array([rates(group, times, "demand") / weights.get(tenant, 1.0) for tenant, group in groups.items()])
    if not len(served):
        return np.zeros(len(times))
    return np.asarray(np.minimum(served.max(axis=0) - served, np.abs(asked - served)).sum(axis=0))


def accumulated(outcome: Outcome, tenants: Sequence[str]) -> tuple[Series, Series]:
    """Sum the exact service per tenant since the start, at the ledger's notes: (times, tenants by times)."""
    times = np.array([when for when, _ in outcome.history])
    sums = np.array([[served.get(tenant, 0.0) for _, served in outcome.history] for tenant in tenants])
    return times, sums.cumsum(axis=1)


def response(records: Sequence[RequestRecord], times: Series) -> Series:
    """Average the time to first token of requests whose first token falls into the minute around t; nan if none."""
    firsts = np.array([[r.first_token, r.ttft] for r in records if r.first_token is not None and r.ttft is not None])
    if not len(firsts):
        return np.full(len(times), np.nan)
    near = [firsts[np.abs(firsts[:, 0] - time) < HALF_WINDOW, 1] for time in times]
    return np.array([values.mean() if len(values) else np.nan for values in near])


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, 100 * share)) if values else 0.0


def summarize(outcome: Outcome, duration: float, bound: float | None, weights: Mapping[str, float]) -> dict[str, Any]:
    """Make one row of the table."""
    records = outcome.records
    finished = [record for record in records if record.finish is not None]
    ttfts = [record.ttft for record in finished if record.ttft is not None]
    latencies = [record.latency for record in finished if record.latency is not None]
    spread = difference(records, duration, weights)
    slo = [record for record in records if record.deadline is not None]
    met = [r for r in slo if r.finish is not None and r.deadline is not None and r.finish <= r.deadline]
    return {
        "policy": outcome.policy,
        "requests": len(records),
        "refused": sum(record.refused for record in records),
        "max_difference": float(spread.max()),
        "mean_difference": float(spread.mean()),
        "variance_difference": float(spread.var()),
        "throughput": sum(r.prompt_len + r.output_len for r in finished) / outcome.end if outcome.end else 0.0,
        "mean_ttft": statistics.fmean(ttfts) if ttfts else None,
        "p99_ttft": percentile(ttfts, 0.99),
        "max_ttft": max(ttfts, default=0.0),
        "mean_latency": statistics.fmean(latencies) if latencies else None,
        "slo_attainment": len(met) / len(slo) if slo else None,
        "largest_gap": outcome.largest_gap,
        "bound": bound,
        "preemptions": outcome.preemptions,
        "adapter_loads": outcome.loads,
        "steps": outcome.steps,
        "seconds": outcome.end,
        "tenants": {
            tenant: {
                "requests": len(group),
                "mean_ttft": _mean([r.ttft for r in group if r.ttft is not None]),
                "service": outcome.service.get(tenant, 0.0),
            }
            for tenant, group in by_tenant(records).items()
        },
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def isolation(row: dict[str, Any], alone: dict[str, float], modest: Sequence[str]) -> tuple[str, float | None]:
    """Judge whether `modest` clients, which ask for less than an equal share, are served as if alone.

    The figure is the worst ratio of mean time to first token in company to that alone, both plus one second, as a wait
    below a second does not matter.
    """
    ratios = [
        ((row["tenants"][tenant]["mean_ttft"] or float("inf")) + 1.0) / (alone[tenant] + 1.0)
        for tenant in modest
        if tenant in row["tenants"]
    ]
    if not ratios:
        return "-", None
    worst = max(ratios)
    return ("yes" if worst <= 3 else "some" if worst <= 10 else "no"), worst
