"""The plan of a workload: which request is due when, for which adapter, how long in and out, in which class.

Everything follows from the file and its seed, so that the simulator, an engine in process and the HTTP client send the
same requests.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np

from inlaid.progress import Bar
from inlaid.workload.draft import Draft, draw_independent
from inlaid.workload.popularity import AdapterChoice, name_by_appearance
from inlaid.workload.prompts import Prompt, PromptFormat
from inlaid.workload.sequence import draw_bursty, draw_merged, draw_sequential, draw_tasks
from inlaid.workload.spec import Stream, Workload
from inlaid.workload.traces import read_trace, trace_period


class Maker(Protocol):
    """Source of prompts for a plan: `prompts.PromptMaker`, or `prompts.LengthsOnly`."""

    @property
    def form(self) -> PromptFormat: ...
    def make(self, index: int, length: int) -> Prompt: ...
    def from_blocks(self, blocks: tuple[int, ...], length: int) -> Prompt: ...
    def count(self, text: str) -> int | None: ...


class PlannedRequest(msgspec.Struct, frozen=True):
    """A request that is due `at` seconds after the start of the run.

    `prompt_len` is None for a text whose tokens are not counted. `max_tokens` is what the request allows where its
    answer ends earlier by itself, after `output_len`; None: it ends because it reaches `output_len`. `deadline_s` is
    when the last token must be there by the class's `e2el_ms`.
    """

    index: int
    at: float
    adapter: str | None
    tenant: str
    service_class: str
    prompt: Prompt
    prompt_len: int | None
    output_len: int
    max_tokens: int | None = None
    deadline_s: float | None = None


def plan(workload: Workload, served: list[str], maker: Maker, shown: bool = False) -> list[PlannedRequest]:
    """List every request in the order in which it is due; with `shown`, behind a progress bar if it takes a while."""
    drafts = _with_tenants_adapters(workload, _draw(workload, served), served)
    if not drafts:
        raise ValueError("the workload has no requests: raise rate, duration_s or num_requests")
    classes = _classes(workload, drafts)
    bar = Bar(drafts, desc="planning", unit="req", delay=1, leave=False, disable=not shown)
    return [_finish(workload, i, d, c, maker) for i, (d, c) in enumerate(zip(bar, classes, strict=True))]


def _draw(workload: Workload, served: list[str]) -> list[Draft]:
    if workload.tasks is not None:
        return draw_tasks(workload, workload.tasks, served)
    if workload.bursty is not None:
        return draw_bursty(workload, workload.bursty, served)
    if workload.sampling == "sequential":
        return draw_sequential(workload, served)
    return draw_merged(workload, served) if workload.sampling == "merged" else draw_independent(workload, served)


def _with_tenants_adapters(workload: Workload, drafts: list[Draft], served: list[str]) -> list[Draft]:
    """Give each tenant its adapter where the workload says `distribution = "tenant"`: for all its streams or none."""
    choices = [stream.adapters for stream in workload.streams]
    choices += [workload.bursty.adapters] if workload.bursty is not None else []
    chosen = [choice for choice in choices if choice.distribution == "tenant"]
    if not chosen:
        return drafts
    if len(chosen) < len(choices):
        raise ValueError('the adapters of all streams or of none have distribution = "tenant"')
    tenants = [draft.tenant for draft in drafts]
    ordered = [stream.tenant for stream in workload.streams] or sorted(set(tenants))
    names: list[str | None] = list(dict.fromkeys([*(name for name in ordered if name in set(tenants)), *tenants]))
    adapters = name_by_appearance(chosen[0], names, served, "the workload has {} tenants with an adapter each")
    given = dict(zip(names, adapters, strict=True))
    return [msgspec.structs.replace(draft, adapter=given[draft.tenant]) for draft in drafts]


def with_adapters(workload: Workload, choice: AdapterChoice) -> Workload:
    """Let all requests choose their adapters in another way: the runner's `skew` axis."""
    replace = msgspec.structs.replace
    if workload.tasks is not None:
        raise ValueError("the requests of [tasks] have their adapters: tasks.zipf says how they spread")
    if workload.bursty is not None:
        return replace(workload, bursty=replace(workload.bursty, adapters=choice))
    return replace(workload, streams=[replace(stream, adapters=choice) for stream in workload.streams])


def rescale_rate(workload: Workload, rate: float) -> Workload:
    """Give the workload another mean rate; the shares of its streams stay as they are."""
    replace = msgspec.structs.replace
    if workload.tasks is not None:
        return replace(workload, tasks=replace(workload.tasks, rate=rate))
    if workload.bursty is not None:
        raise ValueError("[bursty] says how many requests each tenant sends: it has no rate to set")
    total = sum(_stream_rate(stream) for stream in workload.streams)
    return replace(workload, streams=[_at_rate(stream, rate / total) for stream in workload.streams])


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


def _classes(workload: Workload, drafts: list[Draft]) -> list[str]:
    """Name each request's class: by adapter where a class names it, else by share, else `default`."""
    by_adapter = {name: key for key, objective in workload.classes.items() for name in objective.adapters}
    edges = np.cumsum([objective.share for objective in workload.classes.values()])
    names = [*workload.classes, "default"]
    draws = np.random.default_rng([workload.seed, 1 << 33]).random(len(drafts))
    picks = np.searchsorted(edges, draws, side="right")
    return [by_adapter.get(draft.adapter or "", names[int(pick)]) for draft, pick in zip(drafts, picks, strict=True)]


def _finish(workload: Workload, index: int, draft: Draft, service_class: str, maker: Maker) -> PlannedRequest:
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
    objective = workload.classes.get(service_class)
    limit_ms = None if objective is None else objective.e2el_ms
    return PlannedRequest(
        index=index,
        at=draft.at,
        adapter=draft.adapter,
        tenant=draft.tenant,
        service_class=service_class,
        prompt=prompt,
        prompt_len=None if maker.form == "words" else prompt_len,
        output_len=_output_len(draft, maker),
        max_tokens=draft.max_tokens,
        deadline_s=None if limit_ms is None else draft.at + limit_ms / 1000,
    )


def _output_len(draft: Draft, maker: Maker) -> int:
    if draft.output_len is not None:
        return draft.output_len
    completion = draft.row.completion if draft.row is not None else None
    counted = None if completion is None else maker.count(completion)
    if counted is None:
        raise ValueError("the trace says no output length: give the stream output = { kind = ... }")
    return max(1, counted)
