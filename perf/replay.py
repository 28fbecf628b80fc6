"""Replay of a trace on a real engine in this process, measured step by step.

The simulator's cost model is fitted to such steps, and the simulator is validated against such records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from inlaid.engine.engine import Engine
from inlaid.engine.request import FinishReason, Output
from inlaid.engine.step_log import Step, StepLog
from inlaid.sim.request_log import Arrival, RequestLog, RequestRecord


@dataclass
class Replay:
    """Records of the requests, the steps measured, and the seconds that all took."""

    records: list[RequestRecord]
    steps: list[Step]
    seconds: float


class WallClock:
    """Real time since the start; waiting means sleeping."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._start

    def pass_to(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self()))


class BusyClock:
    """This process's processor time, with idle time skipped, so that other work on the machine does not count.

    For an engine that computes on one thread of this process."""

    def __init__(self) -> None:
        self._offset = -time.process_time()

    def __call__(self) -> float:
        return time.process_time() + self._offset

    def pass_to(self, moment: float) -> None:
        self._offset += max(0.0, moment - self())


Clock = WallClock | BusyClock


def replay(
    engine: Engine,
    trace: Sequence[Arrival],
    clock: Clock,
    on_progress: Callable[[int], None] | None = None,
    cut: bool = False,
    on_outputs: Callable[[Sequence[Output], float], None] | None = None,
) -> Replay:
    """Send each request at its time and step until all have ended; the engine has the same clock, at about 0.

    With `cut` an answer is ended at its true length, as a stop string would end it, so that `max_tokens` does not tell
    the scheduler how long it will be. `on_outputs` gets the outputs of every step and its time.
    """
    scheduler, log = engine.scheduler, RequestLog()
    scheduler.step_log = StepLog(scheduler.adapters.rank, every=1, kept=None)
    place = 0
    while place < len(trace) or engine.has_work:
        while place < len(trace) and trace[place].time <= clock():
            log.send(engine, trace[place])
            place += 1
        if not engine.has_work:
            clock.pass_to(trace[place].time)
            continue
        outputs = engine.step()
        now = clock()
        if engine.idle:
            clock.pass_to(now + 0.0005)
        if on_outputs is not None:
            on_outputs(outputs, now)
        ended = log.note(outputs, now) + (_cut(engine, log, outputs, now) if cut else 0)
        if on_progress is not None:
            on_progress(ended)
    return Replay(log.records, scheduler.step_log.list(), clock())


def _cut(engine: Engine, log: RequestLog, outputs: Sequence[Output], now: float) -> int:
    """End the answers that have reached their true length, and return how many."""
    requests = engine.scheduler.requests
    known = [(output.id, log.open[output.id]) for output in outputs if output.id in log.open]
    whole = [name for name, record in known if requests[name].num_outputs >= record.output_len]
    for name in whole:
        engine.abort(name, FinishReason.STOP)
        log.end(name, now, well=True)
    return len(whole)
