"""The experiments, by name: who sends what, how long, on which machine. Each is data; `generate` makes the trace.

The first group has the names, rates, lengths and durations of VTC's artifact; `tasks-N` are LoRA-Inlaid's, many tasks
with their own lengths near saturation. Lengths are [low, high) as in the artifact, so (256, 257) is exactly 256.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.sim.journal import Arrival

Range = tuple[int, int]
MINUTE = 60.0


@dataclass(frozen=True)
class Client:
    """One tenant's stream: `rate` per second from `start` to `end`, evenly spaced or Poisson, on all the time or only
    in every second minute."""

    rate: float
    prompt: Range = (256, 257)
    output: Range = (256, 257)
    process: str = "uniform"  # uniform, poisson, ramp (rate grows to final_rate)
    on_off: bool = False
    start: float = 0.0
    end: float = 0.0  # 0: the suite's duration
    final_rate: float = 0.0
    tenant: int | None = None  # default: the place in the suite


@dataclass(frozen=True)
class Suite:
    """An experiment. `machine` and `num_tokens` are its defaults; a caller may run it elsewhere."""

    name: str
    about: str
    duration: float
    clients: tuple[Client, ...] = ()
    machine: str = "a10g"
    num_tokens: int = 10_000
    weights: Mapping[str, float] = field(default_factory=dict)
    make: Callable[[Suite, int], list[Arrival]] | None = None  # for traces that are not streams of clients
    ranks: tuple[int, ...] = ()  # the ranks that its tasks' adapters have in turn; empty: no adapters
    num_tasks: int = 0
    slots: int = 1_000_000
    scheduler: Mapping[str, float | int | bool] = field(default_factory=dict)
    slo: float = 0.0  # seconds from arrival to the last token
    fair: bool = True  # whether the bound on unfairness is meant for it


def generate(suite: Suite, seed: int = 42) -> list[Arrival]:
    """The suite's trace, in order of time; the same for the same seed."""
    if suite.make is not None:
        return suite.make(suite, seed)
    rng = random.Random(seed)
    arrivals: list[tuple[float, str, int, int]] = []
    for place, client in enumerate(suite.clients):
        tenant = f"client-{place if client.tenant is None else client.tenant}"
        for time in _times(client, client.end or suite.duration, rng):
            arrivals.append((time, tenant, rng.randrange(*client.prompt), rng.randrange(*client.output)))
    return as_trace(sorted(arrivals))


def as_trace(arrivals: Sequence[tuple[float, str, int, int]]) -> list[Arrival]:
    """From (time, tenant, prompt length, output length); answers have their length exactly."""
    prompts: dict[int, list[int]] = {}
    trace = []
    for number, (time, tenant, prompt, output) in enumerate(arrivals):
        request = NewRequest(
            id=str(number),
            prompt=prompts.setdefault(prompt, [0] * prompt),
            params=SamplingParams(max_tokens=output, ignore_eos=True),
            tenant=tenant,
            true_output_len=output,
        )
        trace.append(Arrival(time, request))
    return trace


def _times(client: Client, end: float, rng: random.Random) -> list[float]:
    if client.process == "ramp":
        return _ramp(client, end)
    times = []
    count = int(client.rate * (end - client.start))
    if client.process == "uniform":
        phase = rng.random() / client.rate
        times = [client.start + phase + number / client.rate for number in range(count)]
    else:
        time = client.start
        for _ in range(count):
            time += rng.expovariate(client.rate)
            times.append(time)
    return [time for time in times if time < end and (not client.on_off or int(time / MINUTE) % 2 == 0)]


def _ramp(client: Client, end: float) -> list[float]:
    time, times = client.start, []
    while time < end:
        times.append(time)
        share = (time - client.start) / (end - client.start)
        time += 1.0 / (client.rate + (client.final_rate - client.rate) * share)
    return times


def _one_stream(suite: Suite, seed: int) -> list[Arrival]:
    """One Poisson stream whose requests fall to clients in proportion to their rates."""
    rng = random.Random(seed)
    total = sum(client.rate for client in suite.clients)
    time, arrivals = 0.0, []
    for _ in range(int(total * suite.duration)):
        time += rng.expovariate(total)
        place = rng.choices(range(len(suite.clients)), [client.rate for client in suite.clients])[0]
        client = suite.clients[place]
        arrivals.append((time, f"client-{place}", rng.randrange(*client.prompt), rng.randrange(*client.output)))
    return as_trace(arrivals)


REAL_COUNTS = (296, 262, 199, 120, 67)  # of the published trace's 27 clients, the largest; the smallest sent 1


def real_counts() -> list[int]:
    """1,500 requests of 27 clients: the five largest as published, the rest a smooth tail from 60 down to 1."""
    left = 1500 - sum(REAL_COUNTS)
    shape = [60 * math.exp(-place / 10.6) for place in range(22)]
    tail = [max(1, round(value * left / sum(shape))) for value in shape]
    tail[-1] = 1
    tail[0] += left - sum(tail)
    return [*REAL_COUNTS, *tail]


def real_trace(suite: Suite, seed: int) -> list[Arrival]:
    """Counts as published. A client's requests come in bursts of random size, one for every hundred and some minutes
    wide: limits of requests per minute then refuse as many as they did on the published trace, which is all that is
    known of its times. Lengths are log-normal with the published means (136 in, 256 out, below 1024) and differ by
    client."""
    rng = random.Random(seed)
    drawn: list[list[float]] = []
    for place, count in enumerate(real_counts()):
        bursts = [(rng.random() * suite.duration, rng.expovariate(1.0)) for _ in range(max(1, round(count / 100)))]
        taste = rng.gauss(0, 0.3), rng.gauss(0, 0.3)
        for _ in range(count):
            middle = rng.choices([when for when, _ in bursts], [size for _, size in bursts])[0]
            time = rng.gauss(middle, 100.0)
            prompt, output = math.exp(rng.gauss(4.3 + taste[0], 1.0)), math.exp(rng.gauss(5.2 + taste[1], 0.8))
            drawn.append([time % suite.duration, place, prompt, output])
    prompt_scale = _scale([row[2] for row in drawn], 136)
    output_scale = _scale([row[3] for row in drawn], 256)
    arrivals = [
        (time, f"client-{int(place):02d}", _clip(prompt * prompt_scale), _clip(output * output_scale))
        for time, place, prompt, output in sorted(drawn)
    ]
    return as_trace(arrivals)


def _clip(value: float) -> int:
    return min(1023, max(2, round(value)))


def _scale(values: list[float], mean: float) -> float:
    """The factor that gives the clipped values this mean."""
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if sum(_clip(v * middle) for v in values) < mean * len(values) else (low, middle)
    return low


TASK_KINDS = (  # prompt mean, output mean, spread of the output's logarithm: translation to code
    (60, 40, 0.3),
    (70, 45, 0.3),
    (500, 80, 0.4),
    (350, 60, 0.4),
    (150, 250, 0.6),
    (120, 180, 0.5),
    (200, 10, 0.2),
    (180, 120, 0.6),
)


def tasks_trace(suite: Suite, seed: int, rate: float, zipf: float = 1.0, max_tokens: int = 1024) -> list[Arrival]:
    """Poisson arrivals; tasks have Zipf popularity and lengths of their own; an answer's length is not known to the
    scheduler, which sees max_tokens."""
    rng = random.Random(seed)
    kinds = [TASK_KINDS[rng.randrange(len(TASK_KINDS))] for _ in range(suite.num_tasks)]
    shares = [1.0 / (place + 1) ** zipf for place in range(suite.num_tasks)]
    order = list(range(suite.num_tasks))
    rng.shuffle(order)
    trace: list[Arrival] = []
    time, number = 0.0, 0
    while True:
        time += rng.expovariate(rate)
        if time >= suite.duration:
            return trace
        task = rng.choices(order, shares)[0]
        prompt, output, spread = kinds[task]
        length = min(max_tokens - 1, max(1, round(output * math.exp(rng.gauss(-spread * spread / 2, spread)))))
        words = max(4, round(prompt * math.exp(rng.gauss(0, 0.3))))
        request = NewRequest(
            id=str(number),
            prompt=[task] * words,
            params=SamplingParams(max_tokens=max_tokens),
            adapter=f"task-{task:04d}",
            tenant=f"task-{task:04d}",
            deadline=time + suite.slo if suite.slo else None,
            true_output_len=length,
        )
        trace.append(Arrival(time, request))
        number += 1


def _tasks(num_tasks: int, rate: float, slots: int = 32) -> Suite:
    return Suite(
        f"tasks-{num_tasks}",
        f"{num_tasks} tasks, {rate:g} requests per second, {slots} adapters on the device",
        duration=300.0,
        num_tokens=20_000,
        num_tasks=num_tasks,
        slots=slots,
        ranks=(8, 16, 32, 64),
        make=lambda suite, seed: tasks_trace(suite, seed, rate),
        scheduler={"max_num_seqs": 128},
        slo=12.0,
        fair=False,
    )


def _s4(name: str, rates: tuple[float, float], length: int, num_tokens: int) -> Suite:
    clients = tuple(Client(rate, (length, length + 1), (length, length + 1)) for rate in rates)
    about = f"13B model, {num_tokens} tokens of KV, {length}/{length}"
    return Suite(name, about, 600.0, clients, machine="a100-13b", num_tokens=num_tokens)


def _all() -> list[Suite]:
    c = Client
    wild: Range = (16, 512)
    return [
        Suite("overload", "both send more than their share", 360.0, (c(1.5), c(3.0))),
        Suite("overload-multi", "eight clients of two rates", 360.0, tuple([c(0.4)] * 3 + [c(0.6)] * 5)),
        Suite(
            "overload-weighted",
            "four clients of weights 1, 2, 3, 4",
            360.0,
            (c(0.8), c(0.8), c(1.2), c(1.6)),
            weights={f"client-{place}": place + 1.0 for place in range(4)},
        ),
        Suite("proportional", "one below, one at, one above its share", 600.0, (c(0.25), c(0.5), c(1.5))),
        Suite("on_off_less", "one below its share comes and goes", 600.0, (c(0.5, on_off=True), c(2.0))),
        Suite("on_off_overload", "one above its share comes and goes", 600.0, (c(2.0, on_off=True), c(3.0))),
        Suite(
            "poisson_on_off_overload",
            "lengths of 16 to 511, Poisson, one comes and goes",
            600.0,
            (c(0.5, wild, wild, "poisson", on_off=True), c(2.0, wild, wild, "poisson")),
        ),
        Suite(
            "poisson_short_long",
            "many short, few long requests",
            600.0,
            (c(8.0, (64, 65), (64, 65)), c(1.5)),
            make=_one_stream,
        ),
        Suite(
            "poisson_short_long_2",
            "long prompts and short answers beside the reverse",
            600.0,
            (c(8.0, (512, 513), (32, 33)), c(1.5, (32, 33), (512, 513))),
            make=_one_stream,
        ),
        Suite("increase", "one client sends ever more", 600.0, (c(0.5), c(0.2, process="ramp", final_rate=2.0))),
        Suite(
            "dist_shift",
            "three phases of five minutes",
            900.0,
            (
                c(0.5, on_off=True, end=300.0, tenant=0),
                c(2.0, end=300.0, tenant=1),
                c(1.0, start=300.0, end=600.0, tenant=0),
                c(1.0, start=300.0, end=600.0, tenant=1),
                c(0.5, start=600.0, tenant=0),
                c(1.5, start=600.0, tenant=1),
            ),
        ),
        Suite("ablation_lshare", "one far above the other, little load", 300.0, (c(0.2), c(0.8))),
        _s4("overload-s4", (4.0, 8.0), 256, 65_000),
        _s4("overload-s4-short", (8.0, 16.0), 128, 65_000),
        _s4("overload-s4-long", (2.0, 4.0), 512, 65_000),
        _s4("overload-s4-35000-128", (6.0, 12.0), 128, 35_000),
        _s4("overload-s4-35000-256", (3.0, 6.0), 256, 35_000),
        _s4("overload-s4-35000-512", (1.5, 3.0), 512, 35_000),
        _s4("overload-s4-35000-768", (1.0, 2.0), 768, 35_000),
        Suite("real", "27 clients as in the published trace, or your own with --trace", 600.0, make=real_trace),
        *(_tasks(count, rate) for count, rate in ((2, 6.0), (10, 6.0), (50, 6.0), (100, 6.0), (500, 5.0), (1000, 5.0))),
    ]


SUITES: Mapping[str, Suite] = {suite.name: suite for suite in _all()}
