"""Drafts: the requests of a workload before they have prompts, drawn with one generator per stream."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from inlaid.workload.arrivals import arrival_times
from inlaid.workload.lengths import Lengths, draw_lengths
from inlaid.workload.popularity import choose_adapters, name_by_appearance
from inlaid.workload.spec import Stream, Workload
from inlaid.workload.traces import TraceRow, read_trace, repeat_rows, trace_period


class Draft(msgspec.Struct, frozen=True):
    """A request without its prompt. None: not known before the prompt is made, from `row`."""

    at: float
    adapter: str | None
    tenant: str
    input_len: int | None
    output_len: int | None
    row: TraceRow | None = None
    max_tokens: int | None = None  # what the request allows, where that is more than output_len


def draw_independent(workload: Workload, served: list[str]) -> list[Draft]:
    """Draw every stream from a generator of its own, seeded by the workload's seed and the stream's place."""
    drafts: list[Draft] = []
    for number, stream in enumerate(workload.streams):
        rng = np.random.default_rng([workload.seed, number])
        drafts += _draw_stream(stream, workload.seconds_of(stream), served, rng)
    return sorted(drafts, key=lambda draft: draft.at)


def _draw_stream(stream: Stream, seconds: float | None, served: list[str], rng: np.random.Generator) -> list[Draft]:
    rows: list[TraceRow] | None
    if stream.arrival.process == "trace":
        rows = _timed_rows(stream, seconds)
        times = [row.at or 0.0 for row in rows]
    else:
        times = [float(t) for t in arrival_times(stream.arrival, seconds, stream.num_requests, rng)]
        rows = _sampled_rows(stream, len(times), rng)
    count = len(times)
    if stream.adapters.distribution == "trace":
        assert rows is not None
        adapters = name_by_appearance(stream.adapters, [row.adapter for row in rows], served)
    else:
        adapters = choose_adapters(stream.adapters, served, count, rng)
    inputs = _lengths(stream.input, [r.input_length for r in rows or []], count, rng)
    outputs = _lengths(stream.output, [r.output_length for r in rows or []], count, rng)
    return [
        Draft(
            at=stream.start_s + times[i],
            adapter=adapters[i],
            tenant=stream.name_tenant(adapters[i], rows[i].tenant if rows else None),
            input_len=inputs[i],
            output_len=outputs[i],
            row=_usable(rows[i], stream) if rows else None,
        )
        for i in range(count)
    ]


def _usable(row: TraceRow, stream: Stream) -> TraceRow:
    """Drop a row's own prompt unless the stream takes its input from the trace."""
    return row if stream.input.kind == "trace" else msgspec.structs.replace(row, prompt=None, blocks=())


def _timed_rows(stream: Stream, seconds: float | None) -> list[TraceRow]:
    assert stream.trace is not None
    rows = read_trace(stream.trace)
    if rows[0].at is None:
        raise ValueError(f"{stream.trace.path} has no times: give the stream an arrival process")
    if stream.trace.loop:
        period = trace_period(stream.trace, rows)
        rows = repeat_rows(rows, seconds, stream.num_requests, period)
    limit = math.inf if seconds is None else seconds
    return [row for row in rows if (row.at or 0.0) < limit][: stream.num_requests]


def _sampled_rows(stream: Stream, count: int, rng: np.random.Generator) -> list[TraceRow] | None:
    """Draw rows in a shuffled order, each used once before any is used again."""
    if stream.trace is None:
        return None
    rows = read_trace(stream.trace)
    picks: list[TraceRow] = []
    while len(picks) < count:
        picks += [rows[i] for i in rng.permutation(len(rows))]
    return picks[:count]


def _lengths(spec: Lengths, from_rows: list[int | None], count: int, rng: np.random.Generator) -> list[int | None]:
    if spec.kind != "trace":
        return list(draw_lengths(spec, count, rng))
    return [None if n is None else min(max(n, spec.low), spec.high) for n in from_rows]
