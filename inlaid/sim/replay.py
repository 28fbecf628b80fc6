"""A trace served by a real engine in real time, measured step by step: what the cost model is fitted to, and what the
simulator is validated against."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from inlaid.engine.engine import Engine
from inlaid.engine.request import Batch, FinishReason, NewRequest, Output, Runner, SamplingParams, StepResult
from inlaid.sim.cost import Load
from inlaid.sim.journal import Arrival, Journal, Record


class Step(msgspec.Struct, frozen=True):
    """One measured step: wall time from the end of the one before, host work included, and what it held."""

    seconds: float
    load: Load


class RecordingRunner:
    """Another runner, with the load of the batch that was collected last."""

    def __init__(self, runner: Runner, ranks: Mapping[str, int]) -> None:
        self.inner = runner
        self._ranks = dict(ranks)
        self.overlap = runner.overlap
        self.load: Load | None = None

    def submit(self, batch: Batch) -> Any:
        return Load.of(batch, self._ranks), self.inner.submit(batch)

    def collect(self, ticket: Any) -> StepResult:
        self.load, inner = ticket
        return self.inner.collect(inner)


@dataclass
class Replay:
    """What was measured."""

    records: list[Record]
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
    """This process's processor time, and idle time skipped: what a machine of its own would take, however busy this
    one is with other work. For an engine that computes on one thread of this process."""

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
    ranks: Mapping[str, int],
    clock: Clock,
    on_progress: Callable[[int], None] | None = None,
    cut: bool = False,
) -> Replay:
    """Send each request at its time, step until all have ended. The engine has the same clock, at about 0. With cut an
    answer is ended at its true length, as a stop string would end it, so that max_tokens gives nothing away."""
    recorder = RecordingRunner(engine.runner, ranks)
    engine.runner = recorder
    journal = Journal()
    steps: list[Step] = []
    place, last = 0, clock()
    while place < len(trace) or engine.has_work:
        while place < len(trace) and trace[place].time <= clock():
            journal.send(engine, trace[place])
            place += 1
        if not engine.has_work:
            clock.pass_to(trace[place].time)
            last = clock()
            continue
        recorder.load = None
        outputs = engine.step()
        now = clock()
        if recorder.load is not None:
            steps.append(Step(now - last, recorder.load))
        if engine.idle:
            clock.pass_to(now + 0.0005)
        last = clock() if engine.idle else now
        ended = journal.note(outputs, now) + (_cut(engine, journal, outputs, now) if cut else 0)
        if on_progress is not None:
            on_progress(ended)
    engine.runner = recorder.inner
    return Replay(journal.records, steps, clock())


def _cut(engine: Engine, journal: Journal, outputs: Sequence[Output], now: float) -> int:
    """End the answers that have reached their true length; how many."""
    requests = engine.scheduler.requests
    known = [(output.id, journal.open[output.id]) for output in outputs if output.id in journal.open]
    whole = [name for name, record in known if requests[name].num_outputs >= record.output_len]
    for name in whole:
        engine.abort(name, FinishReason.STOP)
        journal.end(name, now, well=True)
    return len(whole)


def mixed_trace(
    adapters: Sequence[str],
    vocabulary: int,
    duration: float,
    rate: float,
    seed: int,
    prompt: tuple[int, int] = (8, 160),
    output: tuple[int, int] = (4, 96),
    bursts: bool = False,
) -> list[Arrival]:
    """Poisson requests of random tokens, adapter and length; with bursts the rate swings between a third and twice
    itself every half second, so that batches of all sizes are seen."""
    rng = random.Random(seed)
    now = 0.0
    trace: list[Arrival] = []
    while True:
        pace = rate * (2.0 if int(2.0 * now) % 2 else 0.3) if bursts else rate
        now += rng.expovariate(pace)
        if now >= duration:
            return trace
        count = rng.randrange(*output)
        name = rng.choice([None, *adapters])
        request = NewRequest(
            id=f"{seed}-{len(trace)}",
            prompt=[rng.randrange(10, vocabulary) for _ in range(rng.randrange(*prompt))],
            params=SamplingParams(max_tokens=count, ignore_eos=True, temperature=0.0, seed=0),
            adapter=name,
            tenant=name or "base",
            true_output_len=count,
        )
        trace.append(Arrival(now, request))
