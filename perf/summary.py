"""The summary of a run, with the field names of `vllm bench serve`, and what that does not have.

Called by `perf.client` at the end of a run and by `python -m perf.summary RECORDS.jsonl` on kept records.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from inlaid.flags import Parser
from inlaid.workload.spec import Objective, Workload
from perf.fairness import Fairness, fairness
from perf.records import Record, read_records
from perf.slo import Attainment, attainment, attainment_by_class, meets

DEFAULT_PERCENTILES = (50.0, 90.0, 95.0, 99.0)
Number = float | int | None


class Options(msgspec.Struct, frozen=True):
    percentiles: tuple[float, ...] = DEFAULT_PERCENTILES
    objectives: dict[str, Objective] = {}
    weights: dict[str, float] = {}
    detailed: bool = False


def options_for(workload: Workload, percentiles: Iterable[float], detailed: bool) -> Options:
    return Options(tuple(percentiles), workload.classes, workload.weights, detailed)


def summarize(records: list[Record], options: Options) -> dict[str, Any]:
    """Compute every figure of the records that are not warm-up. Latencies are of answered requests only."""
    measured = sorted((r for r in records if not r.warmup), key=lambda record: record.index)
    if not measured:
        raise ValueError("no request was measured: every record is warm-up, or none was sent")
    start = min(record.due for record in measured)
    duration = max(max(r.finished for r in measured) - start, 1e-9)
    answered = [r for r in measured if r.status == "ok"]
    summary: dict[str, Any] = {"duration": duration}
    summary |= _totals(measured, answered, duration, options)
    summary |= _latencies(answered, options.percentiles)
    summary |= {
        "statuses": _counts(r.status for r in measured),
        "lateness_ms": _distribution([r.lateness * 1000 for r in measured], options.percentiles),
        "slo": _slo(measured, options.objectives),
        "jct": _completion_times(measured, options.percentiles),
        "fairness": msgspec.to_builtins(_fairness(measured, options)),
        "spans_ms": _spans(answered),
        "per_adapter": _groups(measured, lambda r: r.adapter or "(base)", duration, options),
        "per_tenant": _groups(measured, lambda r: r.tenant or "(none)", duration, options),
    }
    if options.detailed:
        summary |= _details(measured)
    return summary


def _spans(answered: list[Record]) -> dict[str, float]:
    """Return the mean milliseconds of each part of a request that the server's log tells."""
    names = dict.fromkeys(name for record in answered for name in record.spans)
    return {
        name: 1e3 * statistics.fmean(record.spans[name] for record in answered if name in record.spans)
        for name in names
    }


def _totals(measured: list[Record], answered: list[Record], duration: float, options: Options) -> dict[str, Number]:
    tokens_in = sum(record.input_len for record in answered)
    tokens_out = sum(record.output_len for record in answered)
    good = [r for r in answered if meets(r, options.objectives.get(r.service_class))]
    return {
        "completed": len(answered),
        "failed": len(measured) - len(answered),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(answered) / duration,
        "request_goodput": len(good) / duration if options.objectives else None,
        "output_goodput": sum(r.output_len for r in good) / duration if options.objectives else None,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "offered_rate": _offered_rate(measured),
        "max_output_tokens_per_s": _most_tokens_in_a_second(measured),
        "max_concurrent_requests": _most_at_once(measured),
    }


def _offered_rate(measured: list[Record]) -> float | None:
    """Compute requests due a second; a single instant (a burst) has no rate."""
    span = max(r.due for r in measured) - min(r.due for r in measured)
    return (len(measured) - 1) / span if span > 0 else None


def _latencies(answered: list[Record], percentiles: tuple[float, ...]) -> dict[str, Number]:
    """Compute `mean_ttft_ms` and so on; nothing when no request was answered."""
    series = {
        "ttft": [r.ttft for r in answered if r.ttft is not None],
        "tpot": [tpot for r in answered if (tpot := r.tpot) is not None],
        "itl": [gap for r in answered for gap in r.itls],
        "e2el": [r.e2el for r in answered],
    }
    named: dict[str, Number] = {}
    for name, seconds in series.items():
        spread = _distribution([value * 1000 for value in seconds], percentiles)
        named |= {f"{key}_{name}_ms": value for key, value in spread.items()}
    return named


def _distribution(values: list[float], percentiles: tuple[float, ...]) -> dict[str, Number]:
    if not values:
        return {}
    data = np.array(values)
    spread: dict[str, Number] = {"mean": float(data.mean()), "median": float(np.median(data)), "std": float(data.std())}
    return spread | {f"p{p:g}": float(np.percentile(data, p)) for p in percentiles}


def _most_tokens_in_a_second(records: list[Record]) -> float:
    """Count output tokens in the fullest of the whole seconds since the start."""
    buckets: dict[int, float] = {}
    for record in records:
        times = record.token_times()
        for at in times:
            buckets[int(at)] = buckets.get(int(at), 0.0) + record.output_len / len(times)
    return max(buckets.values(), default=0.0)


def _most_at_once(records: list[Record]) -> int:
    steps = sorted([(r.sent, 1) for r in records] + [(r.finished, -1) for r in records])
    running = most = 0
    for _, step in steps:
        running += step
        most = max(most, running)
    return most


def _counts(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _slo(measured: list[Record], objectives: dict[str, Objective]) -> dict[str, Any] | None:
    if not objectives:
        return None
    by_class: dict[str, Attainment] = attainment_by_class(measured, objectives)
    whole = msgspec.to_builtins(attainment(measured, objectives))
    return {**whole, "by_class": msgspec.to_builtins(by_class), "objectives": msgspec.to_builtins(objectives)}


def _completion_times(measured: list[Record], percentiles: tuple[float, ...]) -> dict[str, Any]:
    """Compute job completion times: a task is all requests for one adapter, done when the last of them is answered.

    Its completion time runs from when its first request was due. A task with a request that got no full
    answer is not complete and has no time.
    """
    per_task: dict[str, float | None] = {}
    for name, group in _grouped(measured, lambda r: r.adapter or "(base)").items():
        complete = all(r.status == "ok" for r in group)
        per_task[name] = max(r.finished for r in group) - min(r.due for r in group) if complete else None
    times = [seconds for seconds in per_task.values() if seconds is not None]
    spread = _distribution(times, percentiles)
    return {"tasks": len(per_task), "complete": len(times), **_suffixed(spread, "_s"), "per_task_s": per_task}


def _suffixed(values: dict[str, Number], suffix: str) -> dict[str, Number]:
    return {key + suffix: value for key, value in values.items()}


def _fairness(measured: list[Record], options: Options) -> Fairness:
    return fairness(measured, options.weights)


def _grouped(records: list[Record], key: Callable[[Record], str]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return dict(sorted(groups.items()))


def _groups(
    measured: list[Record], key: Callable[[Record], str], duration: float, options: Options
) -> dict[str, dict[str, Number]]:
    return {name: _group(group, duration, options) for name, group in _grouped(measured, key).items()}


def _group(group: list[Record], duration: float, options: Options) -> dict[str, Number]:
    answered = [record for record in group if record.status == "ok"]
    tokens_out = sum(record.output_len for record in answered)
    figures: dict[str, Number] = {
        "completed": len(answered),
        "failed": len(group) - len(answered),
        "total_input_tokens": sum(record.input_len for record in answered),
        "total_output_tokens": tokens_out,
        "output_throughput": tokens_out / duration,
    }
    if options.objectives:
        figures["slo_attainment"] = attainment(group, options.objectives).attainment
    return figures | _latencies(answered, options.percentiles)


def _details(measured: list[Record]) -> dict[str, list[Any]]:
    return {
        "input_lens": [r.input_len for r in measured],
        "output_lens": [r.output_len for r in measured],
        "ttfts": [r.ttft for r in measured],
        "itls": [r.itls for r in measured],
        "generated_texts": [r.text for r in measured],
        "errors": [r.error for r in measured],
    }


def as_table(summary: dict[str, Any]) -> str:
    """Format the figures that a person reads first."""
    rows = [
        ("requests answered / failed", f"{summary['completed']} / {summary['failed']}"),
        ("duration (s)", _shown(summary["duration"])),
        ("requests/s, output tokens/s", _pair(summary, "request_throughput", "output_throughput")),
        ("TTFT mean, p99 (ms)", _pair(summary, "mean_ttft_ms", "p99_ttft_ms")),
        ("TPOT mean, p99 (ms)", _pair(summary, "mean_tpot_ms", "p99_tpot_ms")),
        ("ITL mean, p99 (ms)", _pair(summary, "mean_itl_ms", "p99_itl_ms")),
        ("end to end mean, p99 (ms)", _pair(summary, "mean_e2el_ms", "p99_e2el_ms")),
        ("job completion per task mean (s)", _shown(summary["jct"].get("mean_s"))),
        ("Jain's index over tenants", _shown(summary["fairness"]["jain_service"])),
        ("generator late p50, p99 (ms)", _pair(summary["lateness_ms"], "p50", "p99")),
    ]
    if summary["slo"]:
        rows.insert(7, ("SLO attainment, goodput (req/s)", _slo_pair(summary)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _slo_pair(summary: dict[str, Any]) -> str:
    return f"{summary['slo']['attainment']:.1%}, {_shown(summary['request_goodput'])}"


def _pair(values: dict[str, Any], first: str, second: str) -> str:
    return f"{_shown(values.get(first))}, {_shown(values.get(second))}"


def _shown(value: Number) -> str:
    return "-" if value is None else f"{value:,.2f}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="perf.summary", description="Summarize a file of request records.")
    parser.add_argument("records", type=Path)
    arguments = parser.parse_args(argv)
    try:
        summary = summarize(read_records(arguments.records), Options())
    except (OSError, ValueError) as error:
        print(f"perf.summary: {error}", file=sys.stderr)
        return 2
    print(msgspec.json.format(msgspec.json.encode(summary), indent=2).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
