"""Drafts drawn from one generator: sequential and merged streams, tasks, and bursty tenants.

The order of the draws is part of the recorded suites: the same seed must go on giving the same requests, so do not
reorder calls of `rng` here. Fixed lengths are drawn too.
"""

from __future__ import annotations

import math
import random

import numpy as np

from inlaid.workload.draft import Draft
from inlaid.workload.lengths import Lengths
from inlaid.workload.popularity import choose_adapters
from inlaid.workload.spec import BurstyTenants, Stream, Tasks, Workload

Row = tuple[float, str, int, int, int]  # time, tenant, input and output tokens, number of the stream

MIN_TASK_INPUT = 4
TASK_INPUT_SIGMA = 0.3  # standard deviation of the logarithm


def draw_sequential(workload: Workload, served: list[str]) -> list[Draft]:
    """Draw the streams one after the other, `int(rate * seconds)` requests each."""
    rng = random.Random(workload.seed)
    rows: list[Row] = []
    for number, stream in enumerate(workload.streams):
        seconds = workload.seconds_of(stream)
        if seconds is None:
            raise ValueError('sampling "sequential" needs a duration_s for every stream or for the workload')
        for at in _times(stream, stream.start_s + seconds, rng):
            rows.append((at, _tenant(stream), _length(stream.input, rng), _length(stream.output, rng), number))
    return _drafts(workload, rows, served)


def draw_merged(workload: Workload, served: list[str]) -> list[Draft]:
    """Draw one Poisson process of all streams' rates, whose requests fall to the streams in proportion to them."""
    rng = random.Random(workload.seed)
    rates = [stream.arrival.rate for stream in workload.streams]
    if workload.duration_s is None or any(stream.arrival.process != "poisson" for stream in workload.streams):
        raise ValueError('sampling "merged" needs Poisson streams and the workload\'s duration_s')
    at, total = 0.0, sum(rates)
    rows: list[Row] = []
    for _ in range(int(total * workload.duration_s)):
        at += rng.expovariate(total)
        number = rng.choices(range(len(rates)), rates)[0]
        stream = workload.streams[number]
        rows.append((at, _tenant(stream), _length(stream.input, rng), _length(stream.output, rng), number))
    return _drafts(workload, rows, served)


def _drafts(workload: Workload, rows: list[Row], served: list[str]) -> list[Draft]:
    """Sort by time, tenant and lengths; each stream's adapters are drawn from a generator of their own."""
    rows = sorted(rows)
    adapters = []
    for number, stream in enumerate(workload.streams):
        count = sum(row[4] == number for row in rows)
        drawn = choose_adapters(stream.adapters, served, count, np.random.default_rng([workload.seed, number]))
        adapters.append(iter(drawn))
    drafts = []
    for at, tenant, input_len, output_len, number in rows:
        adapter = next(adapters[number])
        drafts.append(Draft(at, adapter, tenant.replace("{adapter}", adapter or "base"), input_len, output_len))
    return drafts


def _tenant(stream: Stream) -> str:
    if stream.trace is not None:
        raise ValueError('a stream with a trace needs sampling = "independent"')
    return stream.tenant


def _length(spec: Lengths, rng: random.Random) -> int:
    if spec.kind == "fixed":
        return rng.randrange(spec.value, spec.value + 1)
    if spec.kind == "uniform":
        return rng.randrange(spec.low, spec.high + 1)
    raise ValueError(f'lengths of kind "{spec.kind}" need sampling = "independent"')


def _times(stream: Stream, end: float, rng: random.Random) -> list[float]:
    arrival, start = stream.arrival, stream.start_s
    if arrival.process == "ramp":
        assert arrival.end_rate is not None
        return _ramp(arrival.rate, arrival.end_rate, start, end)
    pattern = arrival.within if arrival.process == "on-off" else arrival.process
    count = int(arrival.rate * (end - start))
    if pattern == "fixed":
        phase = rng.random() / arrival.rate
        times = [start + phase + number / arrival.rate for number in range(count)]
    elif pattern == "poisson":
        at, times = start, []
        for _ in range(count):
            at += rng.expovariate(arrival.rate)
            times.append(at)
    else:
        raise ValueError(f'arrivals "{pattern}" need sampling = "independent"')
    if arrival.process == "on-off":
        times = [at for at in times if (at - start) % (arrival.on_s + arrival.off_s) < arrival.on_s]
    return [at for at in times if at < end]


def _ramp(rate: float, end_rate: float, start: float, end: float) -> list[float]:
    """Step by the gap of the rate reached so far."""
    at, times = start, []
    while at < end:
        times.append(at)
        share = (at - start) / (end - start)
        at += 1.0 / (rate + (end_rate - rate) * share)
    return times


def draw_tasks(workload: Workload, tasks: Tasks, served: list[str]) -> list[Draft]:
    """Draw Poisson arrivals of tasks by Zipf's law; task k is the k-th adapter served."""
    if tasks.count > len(served):
        raise ValueError(f"the workload has {tasks.count} tasks and {len(served)} adapters are served: serve more")
    assert workload.duration_s is not None
    rng = random.Random(workload.seed)
    kinds = [tasks.kinds[rng.randrange(len(tasks.kinds))] for _ in range(tasks.count)]
    shares = [1.0 / (place + 1) ** tasks.zipf for place in range(tasks.count)]
    order = list(range(tasks.count))
    rng.shuffle(order)
    drafts: list[Draft] = []
    at = 0.0
    while (at := at + rng.expovariate(tasks.rate)) < workload.duration_s:
        task = rng.choices(order, shares)[0]
        kind = kinds[task]
        drift = rng.gauss(-kind.sigma * kind.sigma / 2, kind.sigma)
        output_len = min(tasks.max_tokens - 1, max(1, round(kind.output * math.exp(drift))))
        input_len = max(MIN_TASK_INPUT, round(kind.input * math.exp(rng.gauss(0, TASK_INPUT_SIGMA))))
        name = served[task]
        drafts.append(Draft(at, name, name, input_len, output_len, max_tokens=tasks.max_tokens))
    return drafts


def draw_bursty(workload: Workload, bursty: BurstyTenants, served: list[str]) -> list[Draft]:
    """Draw each tenant's bursts, then its requests around them; lengths are scaled over all tenants at the end."""
    assert workload.duration_s is not None
    rng, seconds = random.Random(workload.seed), workload.duration_s
    drawn: list[tuple[float, int, float, float]] = []
    for tenant, count in enumerate(bursty.requests):
        num_bursts = max(1, round(count / bursty.requests_per_burst))
        bursts = [(rng.random() * seconds, rng.expovariate(1.0)) for _ in range(num_bursts)]
        shifts = rng.gauss(0, bursty.input.tenant_sigma), rng.gauss(0, bursty.output.tenant_sigma)
        for _ in range(count):
            middle = rng.choices([when for when, _ in bursts], [size for _, size in bursts])[0]
            at = rng.gauss(middle, bursty.burst_s)
            input_size = math.exp(rng.gauss(bursty.input.log_median + shifts[0], bursty.input.sigma))
            output_size = math.exp(rng.gauss(bursty.output.log_median + shifts[1], bursty.output.sigma))
            drawn.append((at % seconds, tenant, input_size, output_size))
    inputs = bursty.input.scale([row[2] for row in drawn])
    outputs = bursty.output.scale([row[3] for row in drawn])
    order = sorted(range(len(drawn)), key=lambda place: drawn[place])
    adapters = choose_adapters(bursty.adapters, served, len(drawn), np.random.default_rng([workload.seed, 0]))
    return [
        Draft(drawn[place][0], adapters[number], f"client-{drawn[place][1]:02d}", inputs[place], outputs[place])
        for number, place in enumerate(order)
    ]
