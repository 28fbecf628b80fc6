"""Requests on their way through an engine: arrivals made from a plan, and a record of what became of each.

The simulator and the replay on a real engine (`perf.replay`) both keep their records here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec

from inlaid.engine.engine import Engine
from inlaid.engine.refusal import Refused
from inlaid.engine.request import FinishReason, NewRequest, Output, SamplingParams
from inlaid.workload.plan import PlannedRequest


class Arrival(msgspec.Struct, frozen=True):
    """A request and the time at which it arrives."""

    time: float
    request: NewRequest


def as_arrivals(planned: Sequence[PlannedRequest], served: Sequence[str], real: bool = False) -> list[Arrival]:
    """Turn a plan into requests for an engine in this process; `served` are the adapters in the plan's order.

    A request without a prompt gets its adapter's number as every token, as the length predictor looks at the last
    tokens. On a simulated device an answer with a hidden length ends by an end token; with `real`, end tokens are
    ignored and the replay ends it.
    """
    numbers = {name: number for number, name in enumerate(served)}
    shared: dict[tuple[int, int], list[int]] = {}
    arrivals = []
    for request in planned:
        prompt, number, length = request.prompt, numbers.get(request.adapter or "", 0), request.prompt_len or 1
        if not isinstance(prompt, list):
            prompt = shared.setdefault((number, length), [number] * length)
        params = SamplingParams(
            max_tokens=request.max_tokens or request.output_len,
            ignore_eos=real or request.max_tokens is None,
            temperature=0.0,
            seed=0,
        )
        new = NewRequest(
            id=str(request.index),
            prompt=prompt,
            params=params,
            adapter=request.adapter,
            tenant=request.tenant,
            deadline=request.deadline_s,
            true_output_len=request.output_len,
        )
        arrivals.append(Arrival(request.at, new))
    return arrivals


@dataclass(frozen=True)
class RequestRecord:
    """Outcome of a request. A request that was refused or ended early has no first token or no finish."""

    id: str
    tenant: str
    adapter: str | None
    arrival: float
    prompt_len: int
    output_len: int
    deadline: float | None = None
    first_token: float | None = None
    finish: float | None = None
    refused: bool = False

    @property
    def ttft(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def latency(self) -> float | None:
        return None if self.finish is None else self.finish - self.arrival


class RequestLog:
    """Records of the requests under way (`open`) and of those that have ended (`records`)."""

    def __init__(self) -> None:
        self.open: dict[str, RequestRecord] = {}
        self._ended: list[RequestRecord] = []

    @property
    def records(self) -> list[RequestRecord]:
        """Records of ended requests, in order of arrival."""
        return sorted(self._ended, key=lambda record: record.arrival)

    @property
    def num_ended(self) -> int:
        return len(self._ended)

    def send(self, engine: Engine, arrival: Arrival) -> None:
        """Hand a request to the engine; if a running step made it late, it still counts from its arrival."""
        new = arrival.request
        record = RequestRecord(
            id=new.id,
            tenant=new.tenant,
            adapter=new.adapter,
            arrival=arrival.time,
            prompt_len=len(new.prompt),
            output_len=new.true_output_len or new.params.max_tokens,
            deadline=new.deadline,
        )
        try:
            engine.add(new).arrival = arrival.time
        except Refused as error:
            if error.retry_after is None:
                raise  # the workload asks for what this engine can never serve
            self._ended.append(replace(record, refused=True))
        else:
            self.open[new.id] = record

    def note(self, outputs: Iterable[Output], now: float) -> int:
        """Record a step's outputs; return how many requests have ended with it."""
        before = len(self._ended)
        for output in outputs:
            known = self.open.get(output.id)
            if known is None:
                continue  # `end` was called for it
            if known.first_token is None and output.tokens:
                self.open[output.id] = replace(known, first_token=now)
            if output.finish_reason is not None:
                self.end(output.id, now, well=output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH))
        return len(self._ended) - before

    def end(self, request_id: str, now: float, well: bool) -> None:
        """Close a request's record."""
        known = self.open.pop(request_id)
        self._ended.append(replace(known, finish=now if well else None, refused=not well))
