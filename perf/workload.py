"""The workload: which request is due when, for which adapter, how long in and out, in which class.

`plan` turns a `Workload` (from flags, a file, or the runner) into a list of `PlannedRequest`, which
`perf.client` sends. Everything follows from the seed: the same spec gives the same plan.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import tqdm

from perf.adapters import AdapterChoice, choose_adapters, name_by_appearance
from perf.arrivals import Arrivals, arrival_times
from perf.lengths import Lengths, draw_lengths
from perf.prompts import Prompt, PromptFormat
from perf.toml import load_toml
from perf.traces import Trace, TraceRow, read_trace, repeat_rows, trace_period


class Objective(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request of a class must meet, in milliseconds; None asks nothing.

    `share` puts that part of the requests, drawn by the seed, into the class; `adapters` puts those of
    the named adapters there.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None
    share: float = 0.0
    adapters: list[str] = []

    def __post_init__(self) -> None:
        limits = [v for v in (self.ttft_ms, self.tpot_ms, self.e2el_ms) if v is not None]
        if not 0 <= self.share <= 1 or any(not v > 0 for v in limits):
            raise ValueError("an objective needs limits above 0 ms and a share from 0 to 1")


class Stream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests of one kind; a workload is one or more streams at the same time.

    `tenant` may contain {adapter}; "" sends no tenant. Rows of `trace` are used where arrival, adapters,
    input or output say "trace"; a prompt in the row is sent as it is.
    """

    arrival: Arrivals = Arrivals()
    adapters: AdapterChoice = AdapterChoice()
    input: Lengths = Lengths()
    output: Lengths = Lengths()
    start_s: float = 0.0
    duration_s: float | None = None
    num_requests: int | None = None
    tenant: str = "{adapter}"
    trace: Trace | None = None

    def __post_init__(self) -> None:
        uses = "trace" in (self.arrival.process, self.adapters.distribution, self.input.kind, self.output.kind)
        if uses and self.trace is None:
            raise ValueError('a part says "trace" but the stream has no trace = { path = ... }')
        if not 0 <= self.start_s < math.inf or (self.duration_s is not None and not 0 < self.duration_s < math.inf):
            raise ValueError("start_s must be at least 0 and duration_s above 0, and both finite")
        if self.num_requests is not None and self.num_requests < 1:
            raise ValueError("num_requests must be at least 1")


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    streams: list[Stream]
    seed: int = 0
    classes: dict[str, Objective] = {}
    weights: dict[str, float] = {}  # tenant -> its fair weight; others have 1

    def __post_init__(self) -> None:
        if not self.streams:
            raise ValueError("a workload needs at least one stream")
        if sum(objective.share for objective in self.classes.values()) > 1 + 1e-9:
            raise ValueError("the shares of the classes add up to more than 1")
        if any(not weight > 0 for weight in self.weights.values()):
            raise ValueError("tenant weights must be above 0")


class Maker(Protocol):
    """What a plan needs of `perf.prompts.PromptMaker`."""

    form: PromptFormat

    def make(self, index: int, length: int) -> Prompt: ...
    def from_blocks(self, blocks: tuple[int, ...], length: int) -> Prompt: ...
    def count(self, text: str) -> int | None: ...


class PlannedRequest(msgspec.Struct, frozen=True):
    """`at` is seconds after the start of the run; `prompt_len` is None for a text nobody has counted."""

    index: int
    at: float
    adapter: str | None
    tenant: str
    service_class: str
    prompt: Prompt
    prompt_len: int | None
    output_len: int


class _Draft(msgspec.Struct, frozen=True):
    at: float
    adapter: str | None
    tenant: str
    row: TraceRow | None
    input_len: int | None
    output_len: int | None


def load_workload(path: str) -> Workload:
    """A workload file, TOML or JSON."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"workload {path} does not exist")
    data: Any = load_toml(file) if file.suffix == ".toml" else msgspec.json.decode(file.read_bytes())
    try:
        return msgspec.convert(data, Workload)
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: {error}") from error


def plan(workload: Workload, served: list[str], maker: Maker, shown: bool = False) -> list[PlannedRequest]:
    """Every request of the run in the order in which it is due; with a bar if that is `shown` and takes a while."""
    drafts: list[_Draft] = []
    for number, stream in enumerate(workload.streams):
        drafts += _stream_drafts(stream, served, np.random.default_rng([workload.seed, number]))
    drafts.sort(key=lambda draft: draft.at)
    if not drafts:
        raise ValueError("the workload has no requests: raise rate, duration_s or num_requests")
    classes = _classes(workload, drafts)
    bar = tqdm.tqdm(drafts, desc="planning", unit="req", delay=1, leave=False, disable=not shown)
    return [_finish(i, d, c, maker) for i, (d, c) in enumerate(zip(bar, classes, strict=True))]


def rescale_rate(workload: Workload, rate: float) -> Workload:
    """The same workload at another mean rate: the runner's `rate` axis; shares between streams stay."""
    total = sum(_stream_rate(stream) for stream in workload.streams)
    streams = [_at_rate(stream, rate / total) for stream in workload.streams]
    return msgspec.structs.replace(workload, streams=streams)


def _stream_rate(stream: Stream) -> float:
    if stream.arrival.process == "burst":
        raise ValueError("a burst (all at once) has no rate to set")
    if stream.arrival.process != "trace":
        return stream.arrival.rate
    assert stream.trace is not None
    rows = read_trace(stream.trace)
    return len(rows) / trace_period(stream.trace, rows)


def _at_rate(stream: Stream, factor: float) -> Stream:
    replace = msgspec.structs.replace
    if stream.trace is not None and stream.arrival.process == "trace":
        return replace(stream, trace=replace(stream.trace, time_scale=stream.trace.time_scale / factor))
    end = None if stream.arrival.end_rate is None else stream.arrival.end_rate * factor
    return replace(stream, arrival=replace(stream.arrival, rate=stream.arrival.rate * factor, end_rate=end))


def _stream_drafts(stream: Stream, served: list[str], rng: np.random.Generator) -> list[_Draft]:
    rows: list[TraceRow] | None = None
    if stream.arrival.process == "trace":
        rows = _timed_rows(stream)
        times = [row.at or 0.0 for row in rows]
    else:
        times = [float(t) for t in arrival_times(stream.arrival, stream.duration_s, stream.num_requests, rng)]
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
        _Draft(
            at=stream.start_s + times[i],
            adapter=adapters[i],
            tenant=stream.tenant.replace("{adapter}", adapters[i] or "base"),
            row=_usable(rows[i], stream) if rows else None,
            input_len=inputs[i],
            output_len=outputs[i],
        )
        for i in range(count)
    ]


def _usable(row: TraceRow, stream: Stream) -> TraceRow:
    """A row's own prompt counts only where the stream takes its input from the trace."""
    return row if stream.input.kind == "trace" else msgspec.structs.replace(row, prompt=None, blocks=())


def _timed_rows(stream: Stream) -> list[TraceRow]:
    assert stream.trace is not None
    rows = read_trace(stream.trace)
    if rows[0].at is None:
        raise ValueError(f"{stream.trace.path} has no times: give the stream an arrival process")
    if stream.trace.loop:
        period = trace_period(stream.trace, rows)
        rows = repeat_rows(rows, stream.duration_s, stream.num_requests, period)
    limit = math.inf if stream.duration_s is None else stream.duration_s
    return [row for row in rows if (row.at or 0.0) < limit][: stream.num_requests]


def _sampled_rows(stream: Stream, count: int, rng: np.random.Generator) -> list[TraceRow] | None:
    """Rows in a shuffled order, each used once before any is used again."""
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


def _classes(workload: Workload, drafts: list[_Draft]) -> list[str]:
    """By adapter where a class names it, else by share, else `default`."""
    by_adapter = {name: key for key, objective in workload.classes.items() for name in objective.adapters}
    edges = np.cumsum([objective.share for objective in workload.classes.values()])
    names = [*workload.classes, "default"]
    draws = np.random.default_rng([workload.seed, 1 << 33]).random(len(drafts))
    picks = np.searchsorted(edges, draws, side="right")
    return [by_adapter.get(draft.adapter or "", names[int(pick)]) for draft, pick in zip(drafts, picks, strict=True)]


def _finish(index: int, draft: _Draft, service_class: str, maker: Maker) -> PlannedRequest:
    row = draft.row
    prompt: Prompt
    if row is not None and row.prompt is not None:
        prompt, prompt_len = row.prompt, maker.count(row.prompt)
    elif draft.input_len is None:
        raise ValueError("the trace says no input length: give the stream input = { kind = ... }")
    elif row is not None and row.blocks:
        prompt, prompt_len = maker.from_blocks(row.blocks, draft.input_len), draft.input_len
    else:
        prompt, prompt_len = maker.make(index, draft.input_len), draft.input_len
    return PlannedRequest(
        index=index,
        at=draft.at,
        adapter=draft.adapter,
        tenant=draft.tenant,
        service_class=service_class,
        prompt=prompt,
        prompt_len=None if maker.form == "words" else prompt_len,
        output_len=_output_len(draft, maker),
    )


def _output_len(draft: _Draft, maker: Maker) -> int:
    if draft.output_len is not None:
        return draft.output_len
    completion = draft.row.completion if draft.row is not None else None
    counted = None if completion is None else maker.count(completion)
    if counted is None:
        raise ValueError("the trace says no output length: give the stream output = { kind = ... }")
    return max(1, counted)
