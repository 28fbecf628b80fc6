"""What is asked of an engine, and what became of it: the trace's lines, a record for each, and who keeps the records
while the engine serves. The simulator and the replay on a real engine both write here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec

from inlaid.engine.engine import Engine
from inlaid.engine.refusal import Refused
from inlaid.engine.request import FinishReason, NewRequest, Output


class Arrival(msgspec.Struct, frozen=True):
    """One line of a trace."""

    time: float
    request: NewRequest


@dataclass(frozen=True)
class Record:
    """What became of a request. Refused and ended early: no first token or no finish."""

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


class Journal:
    """The records of those under way and of those who have ended."""

    def __init__(self) -> None:
        self.open: dict[str, Record] = {}
        self._ended: list[Record] = []

    @property
    def records(self) -> list[Record]:
        """Of those who have ended, in order of arrival."""
        return sorted(self._ended, key=lambda record: record.arrival)

    def send(self, engine: Engine, arrival: Arrival) -> None:
        """Hand a request to the engine; if it is late, as a step was running meanwhile, it counts from its time."""
        new = arrival.request
        record = Record(
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
        """What a step brought; how many have ended with it."""
        before = len(self._ended)
        for output in outputs:
            known = self.open.get(output.id)
            if known is None:
                continue  # it was ended by hand
            if known.first_token is None and output.tokens:
                self.open[output.id] = replace(known, first_token=now)
            if output.finish_reason is not None:
                self.end(output.id, now, well=output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH))
        return len(self._ended) - before

    def end(self, request_id: str, now: float, well: bool) -> None:
        known = self.open.pop(request_id)
        self._ended.append(replace(known, finish=now if well else None, refused=not well))
