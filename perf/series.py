"""Curves of the report as plain numbers: time series, distributions, attainment against rate.

Pure functions of records and summaries, so that they are tested without drawing anything. Used by `perf.report`.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import numpy as np

from perf.records import Record

Points = tuple[list[float], list[float]]  # x, y


class Run(msgspec.Struct, frozen=True):
    """One run as the report sees it: its name, its summary, and the records that are not warm-up."""

    label: str
    summary: dict[str, Any]
    records: list[Record]

    @property
    def duration(self) -> float:
        return float(self.summary["duration"])

    @property
    def start(self) -> float:
        return min((record.due for record in self.records), default=0.0)


def bucket_width(duration: float) -> float:
    """Choose a round number of seconds that gives at most about sixty buckets."""
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
    return next((step for step in steps if duration / step <= 60), duration / 60)


def rate(run: Run, width: float, finished: bool) -> Points:
    """Count requests a second: due, or answered."""
    times = [r.finished for r in run.records if r.status == "ok"] if finished else [r.due for r in run.records]
    return _per_bucket(run, times, width)


def output_rate(run: Run, width: float) -> Points:
    """Compute output tokens a second."""
    times: list[float] = []
    weights: list[float] = []
    for record in run.records:
        stamps = record.token_times()
        times += stamps
        weights += [record.output_len / len(stamps)] * len(stamps) if stamps else []
    return _per_bucket(run, times, width, weights)


def _per_bucket(run: Run, times: list[float], width: float, weights: list[float] | None = None) -> Points:
    count = max(1, int(np.ceil(run.duration / width)))
    edges = np.arange(count + 1) * width
    totals, _ = np.histogram(np.array(times) - run.start, edges, weights=weights)
    return (edges[:-1] + width / 2).tolist(), (totals / width).tolist()


def percentile_over_time(run: Run, kind: str, percentile: float, width: float) -> Points:
    """Compute a percentile in ms per bucket: of TTFT by due time, of inter-token latency by the token's time."""
    buckets: dict[int, list[float]] = {}
    for at, value in _samples(run, kind):
        buckets.setdefault(int((at - run.start) / width), []).append(value * 1000)
    keys = sorted(buckets)
    return [(k + 0.5) * width for k in keys], [float(np.percentile(buckets[k], percentile)) for k in keys]


def _samples(run: Run, kind: str) -> list[tuple[float, float]]:
    if kind == "ttft":
        return [(record.due, record.ttft) for record in run.records if record.ttft is not None]
    return [(at, gap) for record in run.records for at, gap in zip(record.token_times()[1:], record.itls, strict=True)]


def distribution(run: Run, kind: str, points: int = 400) -> Points:
    """Compute the share of values up to x, in milliseconds, at no more than `points` values."""
    answered = [record for record in run.records if record.status == "ok"]
    if kind == "ttft":
        values = [record.ttft for record in answered if record.ttft is not None]
    elif kind == "itl":
        values = [gap for record in answered for gap in record.itls]
    else:
        values = [record.e2el for record in answered]
    if not values:
        return [], []
    shares = np.linspace(0, 1, min(points, max(2, len(values))))
    return (np.quantile(values, shares) * 1000).tolist(), shares.tolist()


def cumulative_service(run: Run, tenants: int = 6, points: int = 100) -> dict[str, Points]:
    """Sum service up to each instant (input + 2 * output tokens) of the tenants that were served most and least."""
    at = np.linspace(run.start, run.start + run.duration, points)
    curves: dict[str, tuple[float, Points]] = {}
    for tenant in sorted({record.tenant for record in run.records}):
        times, amounts = _service([record for record in run.records if record.tenant == tenant])
        total = np.concatenate([np.zeros(1), np.cumsum(amounts)])
        level = total[np.searchsorted(times, at, side="right")]
        curves[tenant or "(none)"] = (float(total[-1]), ((at - run.start).tolist(), level.tolist()))
    ranked = sorted(curves, key=lambda name: -curves[name][0])
    shown = ranked if len(ranked) <= tenants else ranked[: tenants // 2] + ranked[-(tenants // 2) :]
    return {name: curves[name][1] for name in shown}


def _service(records: list[Record]) -> tuple[Any, Any]:
    events: list[tuple[float, float]] = []
    for record in records:
        stamps = record.token_times()
        events += [(at, 2.0 * record.output_len / len(stamps)) for at in stamps]
        events += [(stamps[0], float(record.input_len))] if stamps else []
    events.sort()
    return np.array([at for at, _ in events]), np.array([amount for _, amount in events])


def against_rate(runs: list[Run], figure: str) -> dict[str, Points]:
    """Curves of a figure over the offered rate; runs whose labels differ only in `rate-…` are one curve."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        x, y = run.summary.get("offered_rate"), _figure(run.summary, figure)
        if x is not None and y is not None:
            curves.setdefault(curve_name(run.label), []).append((x, y))
    return {name: _unzip(sorted(points)) for name, points in curves.items()}


def curve_name(label: str) -> str:
    return re.sub(r"/?\brate-[0-9.]+", "", label).strip("/") or "all"


def _figure(summary: dict[str, Any], name: str) -> float | None:
    if name == "attainment":
        return summary["slo"]["attainment"] if summary.get("slo") else None
    value = summary.get(name)
    return None if value is None else float(value)


def _unzip(points: list[tuple[float, float]]) -> Points:
    return [x for x, _ in points], [y for _, y in points]
