"""Figures 3 to 14 of VTC's paper, from the records of a live server or from the simulator: the same code for both."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from inlaid.sim.metrics import difference, summarize
from inlaid.sim.plot import draw_lines, draw_suite
from inlaid.sim.request_log import RequestRecord
from inlaid.sim.simulate import Outcome
from inlaid.workload.spec import Workload
from perf.fairness import INPUT_PRICE, OUTPUT_PRICE
from perf.records import Record

NUMBERS: Mapping[str, str] = MappingProxyType(  # of the paper's figures, by suite
    {
        "overload": "3", "proportional": "4", "on_off_less": "5", "on_off_overload": "6", "poisson_short_long": "7",
        "poisson_short_long_2": "8", "increase": "9", "dist_shift": "10", "real": "11 and 12",
        "ablation_lshare": "13", "overload-weighted": "weighted",
    }
)  # fmt: skip
POOLS = "14"  # request lengths and pools, of the suites overload-s4-*


def outcome_of(records: Sequence[Record], policy: str) -> Outcome:
    """Return a live run as the simulator's outcome: service by the clients' clocks, a second apart."""
    counted = [record for record in records if not record.warmup]
    start = min((record.due for record in counted), default=0.0)
    end = max((record.finished for record in counted), default=start) - start
    service, waits = _by_second(counted, start, end)
    gaps = _gaps(service, waits)
    made = [
        RequestRecord(
            id=str(record.index), tenant=record.tenant, adapter=record.adapter, arrival=record.due - start,
            prompt_len=record.input_len, output_len=record.output_len or record.planned_output_len,
            first_token=None if record.ttft is None else record.sent + record.ttft - start,
            finish=record.finished - start if record.status == "ok" else None, refused=record.status == "refused",
        )
        for record in counted
    ]  # fmt: skip
    history = [
        (float(second), {tenant: float(amounts[second]) for tenant, amounts in service.items() if amounts[second]})
        for second in range(int(end) + 1)
    ]
    return Outcome(
        policy=policy, records=sorted(made, key=lambda record: record.arrival), end=end, busy=end, history=history,
        largest_gap=gaps[-1][1] if gaps else None, gap_series=gaps, preemptions=0, loads=0, steps=0,
        service={tenant: float(amounts.sum()) for tenant, amounts in service.items()},
    )  # fmt: skip


def _by_second(
    records: Sequence[Record], start: float, end: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return each tenant's service in each second, and whether it had a request that waited for its first token."""
    seconds = int(end) + 1
    tenants = sorted({record.tenant for record in records})
    service = {tenant: np.zeros(seconds) for tenant in tenants}
    waits = {tenant: np.zeros(seconds, bool) for tenant in tenants}
    for record in records:
        times = record.token_times()
        until = times[0] if times else record.finished
        waits[record.tenant][int(record.sent - start) : int(until - start) + 1] = True
        for place, when in enumerate(times):
            amount = OUTPUT_PRICE * record.output_len / len(times) + (0 if place else INPUT_PRICE * record.input_len)
            service[record.tenant][min(seconds - 1, int(when - start))] += amount
    return service, waits


def _gaps(service: Mapping[str, np.ndarray], waits: Mapping[str, np.ndarray]) -> list[tuple[float, float]]:
    """Return, second by second, the largest difference so far between the services of two tenants while both waited."""
    sums = {tenant: amounts.cumsum() for tenant, amounts in service.items()}
    seconds = len(next(iter(sums.values()), ()))
    largest = np.zeros(seconds)
    for one, other in itertools.combinations(sums, 2):
        apart, low, high = sums[one] - sums[other], 0.0, 0.0
        both = waits[one] & waits[other]
        for second in range(seconds):
            if not both[second]:
                continue
            now = float(apart[second])
            fresh = second == 0 or not both[second - 1]
            low, high = (now, now) if fresh else (min(low, now), max(high, now))
            largest[second] = max(largest[second], high - low)
    return [(float(second), float(value)) for second, value in enumerate(np.maximum.accumulate(largest))]


def draw_page(
    folder: Path, found: Mapping[str, Sequence[Outcome]], workloads: Mapping[str, Workload], where: str
) -> Path:
    """Draw every suite's figures into a folder, and write a page that shows them by the paper's numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# VTC's figures", "", f"From {where}. Service: 1 for a prompt token, 2 for an output token.", ""]
    for suite, outcomes in found.items():
        number = NUMBERS.get(suite, POOLS if suite.startswith("overload-s4") else "none")
        duration = _duration(workloads[suite], outcomes)
        shown = [outcome for outcome in outcomes if not outcome.policy.startswith("rpm")] or list(outcomes)
        draw_suite(folder / f"{suite}.png", f"{suite} (figure {number})", shown, duration, None)
        draw_lines(
            folder / f"{suite}-difference.png",
            f"{suite}: difference of service",
            ("time, s", "tokens a second, over a minute"),
            {outcome.policy: _windowed(outcome, duration, workloads[suite]) for outcome in shown},
        )
        lines += [f"## {suite}: figure {number}", "", _rows(outcomes, duration, workloads[suite]), ""]
        lines += [f"![{suite}]({suite}.png)", "", f"![Difference of service]({suite}-difference.png)", ""]
        limits = _by_limit(outcomes)
        if len(limits) > 1:
            title, labels = f"{suite}: throughput under limits (figure 13)", ("requests a minute", "tokens a second")
            others = {o.policy: [(limit, _throughput(o)) for limit, _ in limits] for o in outcomes if o.policy == "vtc"}
            draw_lines(folder / f"{suite}-limits.png", title, labels, {"rpm": limits, **others})
            lines += [f"![Throughput under limits]({suite}-limits.png)", ""]
    page = folder / "figures.md"
    page.write_text("\n".join(lines))
    return page


def _duration(workload: Workload, outcomes: Sequence[Outcome]) -> float:
    return workload.duration_s or max((record.arrival for o in outcomes for record in o.records), default=1.0) or 1.0


def _windowed(outcome: Outcome, duration: float, workload: Workload) -> list[tuple[float, float]]:
    values = difference(outcome.records, duration, workload.weights)
    return [(duration / 20 * 0.95 * i + 30.0, float(value)) for i, value in enumerate(values, 1)]


def _throughput(outcome: Outcome) -> float:
    done = [record for record in outcome.records if record.finish is not None]
    return sum(record.prompt_len + record.output_len for record in done) / outcome.end if outcome.end else 0.0


def _by_limit(outcomes: Sequence[Outcome]) -> list[tuple[float, float]]:
    limited = [outcome for outcome in outcomes if outcome.policy.startswith("rpm:limit=")]
    return sorted((float(outcome.policy.rpartition("=")[2]), _throughput(outcome)) for outcome in limited)


def _rows(outcomes: Sequence[Outcome], duration: float, workload: Workload) -> str:
    """Return a table of the figures that the paper's tables have."""
    lines = ["| policy | requests | refused | max difference | mean difference | tokens/s | mean first token, s |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for outcome in outcomes:
        row = summarize(outcome, duration, None, workload.weights)
        first = "-" if row["mean_ttft"] is None else f"{row['mean_ttft']:.2f}"
        lines.append(
            f"| {row['policy']} | {row['requests']} | {row['refused']} | {row['max_difference']:.1f} | "
            f"{row['mean_difference']:.1f} | {row['throughput']:.0f} | {first} |"
        )
    return "\n".join(lines)
