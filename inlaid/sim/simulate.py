"""A trace served on a virtual clock: the engine, scheduler, policies, ledger and predictor are the real ones; only the
runner and the adapters' residence are replaced by the cost model. Deterministic: no clock, no thread, no device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from inlaid.config import CacheConfig, SchedulerConfig, SpeculationConfig
from inlaid.engine.engine import Engine
from inlaid.engine.policy import Lengths, MaxTokens
from inlaid.engine.predictor import Oracle, Predictor
from inlaid.engine.request import Batch, Sampled, StepResult, Work, accept
from inlaid.engine.scheduler import Scheduler
from inlaid.engine.speculation import Speculation
from inlaid.sim.adapters import SimAdapters
from inlaid.sim.cost import CostModel, Load
from inlaid.sim.request_log import Arrival, RequestLog, RequestRecord
from inlaid.sim.traced import WORD, Acceptances, TracedDrafter

EOS = 1


@dataclass(frozen=True)
class Setup:
    """A machine, its memory, and how it is scheduled."""

    cost: CostModel
    policy: str = "fcfs"
    num_tokens: int = 10_000  # KV memory, in tokens
    block_size: int = 16
    lengths: str | Callable[[], Lengths] = "history"  # a predictor's name, or what makes one
    slots: int = 1_000_000  # adapters that fit on the device together
    adapter_mode: str = "on-demand"  # see sim/adapters.py
    ranks: dict[str, int] = field(default_factory=dict)
    resident: tuple[str, ...] = ()  # adapters that are on the device at the start
    weights: dict[str, float] = field(default_factory=dict)
    max_model_len: int = 4096
    scheduler: dict[str, Any] = field(default_factory=dict)  # further SchedulerConfig fields
    prefix_caching: bool = False
    scheduler_type: type[Scheduler] = Scheduler  # or one that does something in another way, to see what that does
    overlap: bool = False  # the host makes a step while the device computes the one before
    max_paired_tenants: int = 64  # gaps between pairs are followed up to this number of tenants
    acceptances: Acceptances | None = None  # drafts as on a real engine, see sim/traced.py; None: no drafts
    num_guesses: int = 8  # most in a draft
    seed: int = 0


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class SimRunner:
    """Runner without a model: an answer ends at its true length, and a step takes the seconds of the cost model.

    Steps follow each other on the device. With overlap one is submitted while the one before is computed, so a request
    that arrives meanwhile gets its first token a step later than without. The host takes its time to make and submit a
    step: it sees the end of the one before no sooner, and no step ends before all of it was launched. Decodes, one
    graph, begin when they are launched, prompts with their first kernel.
    """

    def __init__(self, setup: Setup, clock: Clock, adapters: SimAdapters) -> None:
        self.overlap = setup.overlap
        self._adapters = adapters
        self._cost = setup.cost
        self._clock = clock
        self._ranks = setup.ranks
        self._word = Sampled(WORD)
        self._end = Sampled(EOS)
        self._free = 0.0  # when the device has computed everything submitted
        self.busy = 0.0
        self.received: set[str] = set()  # requests whose prompts another device has computed: their KV came over a link

    def submit(self, batch: Batch) -> tuple[Batch, float]:
        load, begin = Load.of(self._own(batch), self._ranks), self._clock.now
        if self.overlap:
            self._clock.now += self._cost.host_seconds(load)
        start = max(self._free, begin if load.prefills else self._clock.now)
        seconds = self._adapters.step_seconds(batch, self._cost.step_seconds(load), start)
        self._free = max(start + seconds, self._clock.now)
        self.busy += seconds
        return batch, self._free

    def _own(self, batch: Batch) -> Batch:
        """Return a batch without the prompts that need not be computed."""
        if not self.received:
            return batch
        free = [work for work in batch.works if not work.is_decode and work.request.id in self.received]
        self.received -= {work.request.id for work in free if work.samples}
        return replace(batch, works=tuple(work for work in batch.works if work not in free))

    def collect(self, ticket: tuple[Batch, float]) -> StepResult:
        batch, done = ticket
        self._clock.now = max(self._clock.now, done)
        sampled = []
        for work in batch.works:
            if work.samples:
                sampled.append(accept(work, self._words(work)) if work.draft else self._words(work)[0])
        return StepResult(sampled)

    def _words(self, work: Work) -> list[Sampled]:
        """Return the token at each position of a work that yields one."""
        first, last = work.request.num_outputs + 1, work.request.true_output_len
        return [self._end if first + place == last else self._word for place in range(1 + len(work.draft))]


class GapWatch:
    """The largest difference in weighted service between two tenants over any interval in which both had requests
    waiting all the time: what VTC bounds."""

    def __init__(self, tenants: Sequence[str]) -> None:
        self._index = {tenant: i for i, tenant in enumerate(tenants)}
        size = len(tenants)
        self._low = np.full((size, size), np.inf)
        self._high = np.full((size, size), -np.inf)
        self.largest = 0.0

    def look(self, scheduler: Scheduler) -> None:
        size = len(self._index)
        served, waits = np.zeros(size), np.zeros(size, dtype=bool)
        for account in scheduler.ledger.accounts.values():
            place = self._index[account.tenant]
            served[place] = account.service / account.weight
            waits[place] = account.num_waiting > 0
        gap = served[:, None] - served[None, :]
        both = waits[:, None] & waits[None, :]
        self._low = np.where(both, np.minimum(self._low, gap), np.inf)
        self._high = np.where(both, np.maximum(self._high, gap), -np.inf)
        if both.any():
            self.largest = max(self.largest, float((self._high - self._low)[both].max()))


@dataclass
class Outcome:
    """Results of a simulation."""

    policy: str
    records: list[RequestRecord]
    end: float
    busy: float
    history: list[tuple[float, dict[str, float]]]  # exact service per tenant, about a second apart
    largest_gap: float | None  # between tenants that both waited, see GapWatch
    gap_series: list[tuple[float, float]]
    preemptions: int
    loads: int
    steps: int
    service: dict[str, float]


def make_lengths(name: str | Callable[[], Lengths], seed: int) -> Lengths:
    """Make the predictor named `history`, `none`, `oracle`, or `noisy:0.5`, or by calling what is given."""
    if callable(name):
        return name()
    kind, _, value = name.partition(":")
    if kind == "history":
        return Predictor()
    if kind == "none":
        return MaxTokens()
    if kind == "oracle":
        return Oracle()
    if kind == "noisy":
        return Oracle(float(value), seed)
    raise ValueError(f"unknown lengths {name!r}; known: history, none, oracle, noisy:FACTOR")


def make_engine(setup: Setup, clock: Clock) -> tuple[Engine, SimRunner, SimAdapters]:
    """Make the real engine on a simulated device."""
    adapters = SimAdapters(
        setup.cost, clock, slots=setup.slots, ranks=setup.ranks, resident=setup.resident, mode=setup.adapter_mode
    )
    settings = {"max_num_seqs": 1000, "max_num_batched_tokens": 3072, "max_num_waiting": 10**9, **setup.scheduler}
    scheduler = setup.scheduler_type(
        SchedulerConfig(policy=setup.policy, **settings),
        CacheConfig(block_size=setup.block_size, enable_prefix_caching=setup.prefix_caching),
        num_blocks=setup.num_tokens // setup.block_size + 1,
        max_model_len=min(setup.max_model_len, setup.num_tokens),
        adapters=adapters,
        eos_ids=(EOS,),
        lengths=make_lengths(setup.lengths, setup.seed),
        speculation=make_speculation(setup),
    )
    scheduler.ledger.set_weights(setup.weights)
    runner = SimRunner(setup, clock, adapters)
    return Engine(scheduler, runner, clock), runner, adapters


def make_speculation(setup: Setup) -> Speculation | None:
    """Make the drafts that a setup has a trace of."""
    if setup.acceptances is None:
        return None
    config = SpeculationConfig(speculation="suffix", num_speculative_tokens=setup.num_guesses)
    return Speculation(config, TracedDrafter(setup.acceptances))


def simulate(trace: Sequence[Arrival], setup: Setup, on_progress: Callable[[int], None] | None = None) -> Outcome:
    """Serve a trace, in order of time, until every request has ended; `on_progress` is told of how many more have."""
    clock = Clock()
    engine, runner, adapters = make_engine(setup, clock)
    scheduler = engine.scheduler
    log = RequestLog()
    tenants = sorted({arrival.request.tenant for arrival in trace})
    watch = GapWatch(tenants) if 1 < len(tenants) <= setup.max_paired_tenants else None
    series: list[tuple[float, float]] = []
    place = steps = ended = 0
    while place < len(trace) or engine.has_work:
        while place < len(trace) and trace[place].time <= clock.now:
            log.send(engine, trace[place])
            place += 1
        if not engine.has_work:
            if place < len(trace):
                clock.now = trace[place].time
            continue
        log.note(engine.step(), clock.now)
        steps += 1
        if on_progress is not None and log.num_ended > ended:
            on_progress(log.num_ended - ended)
            ended = log.num_ended
        if watch is not None:
            watch.look(scheduler)
            if not series or clock.now >= series[-1][0] + 1.0:
                series.append((clock.now, watch.largest))
        if engine.idle:
            following = trace[place].time if place < len(trace) else float("inf")
            clock.now = max(clock.now + 1e-6, min(following, adapters.next_ready(), clock.now + 0.1))
    scheduler.ledger.note(clock.now + 1.0)
    return Outcome(
        policy=setup.policy,
        records=log.records,
        end=clock.now,
        busy=runner.busy,
        history=list(scheduler.ledger.history),
        largest_gap=None if watch is None else watch.largest,
        gap_series=series,
        preemptions=scheduler.num_preemptions,
        loads=adapters.num_loads,
        steps=steps,
        service={account.tenant: account.service for account in scheduler.ledger.accounts.values()},
    )
