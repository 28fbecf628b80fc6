"""Cost of scheduling: microseconds of host time per step, by policy, and its growth with the number of requests.

Why it matters: with an overlapping runner the host has one device step (some milliseconds) to make the next batch; on
a small model or a fast device scheduling is what the device waits for. Nothing is computed here: tokens are drawn, so
all the time is the scheduler's, the ledger's, the policy's and the predictor's.

    python -m perf.scheduling.measure --out perf/results/scheduling-cost.json

The state is steady: 256 running, 10,000 waiting, 1,000 tenants, 100 adapters; an answer that ends is replaced by a new
arrival, so every step decodes, admits, ends and refills. Time is this thread's processor time. Other work on the
machine slows even that (shared caches, sibling threads), so all cases take turns over several runs, and of the runs'
medians over steps the least and the median are given; and a fixed piece of Python is timed beside every step, whose
median over its least in the whole record is `slowdown`: how busy the machine was.
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from inlaid.config import CacheConfig, SchedulerConfig
from inlaid.engine.predictor import Predictor
from inlaid.engine.request import FinishReason, NewRequest, Sampled, SamplingParams, StepResult
from inlaid.engine.scheduler import Scheduler
from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.report.provenance import provenance
from inlaid.sim.experiment import prepare, run
from inlaid.workload.suites import load_suite

POLICIES = ("fcfs", "priority", "srtf", "inlaid", "vtc", "vtc:predict=predicted", "lcf", "drr", "slo:seconds=30")
NUM_ADAPTERS = 100


class Resident:
    """Every adapter is on the device."""

    def resolve(self, name: str) -> str:
        return name

    def release(self, identity: str) -> None: ...

    def ready(self, identity: str) -> bool:
        return True

    def want(self, identity: str) -> None: ...

    def pin(self, identity: str) -> None: ...

    def load_seconds(self, identity: str) -> tuple[float, float]:
        return 0.0, 0.0

    def unpin(self, identity: str) -> None: ...

    def rank(self, identity: str) -> int:
        return 16


class Crowd:
    """Source of requests: prompts of 64..191 tokens, outputs of 32..223, any tenant, any adapter."""

    def __init__(self, num_tenants: int) -> None:
        self._rng = random.Random(0)
        self._num_tenants = num_tenants
        self._count = 0

    def draw(self) -> NewRequest:
        self._count += 1
        rng = self._rng
        return NewRequest(
            id=str(self._count),
            prompt=[rng.randrange(32000) for _ in range(rng.randrange(64, 192))],
            params=SamplingParams(max_tokens=rng.randrange(32, 224), ignore_eos=True),
            adapter=f"a{rng.randrange(NUM_ADAPTERS)}",
            tenant=f"t{rng.randrange(self._num_tenants)}",
        )


class _Cell:
    def __init__(self, value: int) -> None:
        self.value = value
        self.seen: list[int] = []


CELLS = tuple(_Cell(value) for value in range(256))


def reference() -> float:
    """Seconds of a fixed piece of work of the scheduler's kind: attributes, short lists, small tuples."""
    start = time.thread_time()
    made = []
    for cell in CELLS:
        cell.seen = [cell.value]
        made.append((cell, len(cell.seen), cell.value + 1))
    return time.thread_time() - start


def measure(policy: str, running: int, waiting: int, tenants: int, steps: int) -> dict[str, float]:
    """Medians over the steps of one run, after the crowd has settled."""
    config = SchedulerConfig(policy=policy, max_num_seqs=running, max_num_waiting=10**9)
    scheduler = Scheduler(
        config,
        CacheConfig(),
        num_blocks=running * 64,
        max_model_len=4096,
        adapters=Resident(),
        lengths=Predictor(),
    )
    crowd, now = Crowd(tenants), 0.0
    for _ in range(waiting + running):
        scheduler.add(crowd.draw(), now)
    times: dict[str, list[float]] = {"schedule": [], "commit": [], "add": [], "reference": []}
    token = Sampled(5)
    settle = 200
    gc.collect()
    gc.freeze()
    for step in range(settle + steps):
        now += 0.02
        start = time.thread_time()
        batch = scheduler.schedule(now)
        scheduled = time.thread_time()
        assert batch is not None
        result = StepResult([token for work in batch.works if work.samples])
        before = time.thread_time()
        outputs = scheduler.commit(batch, result, now)
        committed = time.thread_time()
        ended = sum(output.finish_reason is not None for output in outputs)
        fresh = [crowd.draw() for _ in range(ended)]
        adding = time.thread_time()
        for new in fresh:
            scheduler.add(new, now)
        added = time.thread_time()
        if step >= settle:
            times["schedule"].append(scheduled - start)
            times["commit"].append(committed - before)
            times["reference"].append(reference())
            if ended:
                times["add"].append((added - adding) / ended)
    gc.unfreeze()
    micro = {name: [1e6 * value for value in values] for name, values in times.items()}
    both = [a + b for a, b in zip(micro["schedule"], micro["commit"])]
    return {
        "schedule_us": statistics.median(micro["schedule"]),
        "commit_us": statistics.median(micro["commit"]),
        "step_us": statistics.median(both),
        "step_p99_us": statistics.quantiles(both, n=100)[-1],
        "add_us": statistics.median(micro["add"] or [0.0]),
        "reference_us": statistics.median(micro["reference"]),
        "least_reference_us": min(micro["reference"]),
    }


def over_runs(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the least and the median of each figure over the runs."""
    columns = {name: [run[name] for run in runs] for name in runs[0] if "reference" not in name}
    return {name: {"least": min(column), "median": statistics.median(column)} for name, column in columns.items()}


def measure_predictor(count: int = 3000) -> dict[str, float]:
    """Microseconds to predict one request's length, and to learn from one answer; and how well ranges cover."""
    predictor, crowd, rng = Predictor(), Crowd(1), random.Random(1)
    scheduler = Scheduler(
        SchedulerConfig(max_num_waiting=10**9), CacheConfig(), num_blocks=100, max_model_len=4096, adapters=Resident()
    )
    predicting, learning, inside = [], [], 0
    for number in range(count):
        request = scheduler.add(crowd.draw(), float(number))
        assert request.adapter is not None
        length = max(1, round(rng.lognormvariate(2.0 + int(request.adapter[1:]) % 7 / 2, 0.4)))
        request.limit = request.num_prompt + 4000
        if number > count // 2:
            inside += predictor.quantile(request, 0.05) <= length <= predictor.quantile(request, 0.95)
        start = time.thread_time()
        predictor.remaining(request)
        middle = time.thread_time()
        request.tokens += [0] * length
        request.finish_reason = FinishReason.STOP
        before = time.thread_time()
        predictor.observe(request)
        learning.append(1e6 * (time.thread_time() - before))
        predicting.append(1e6 * (middle - start))
    return {
        "predict_us": statistics.median(predicting),
        "learn_us": statistics.median(learning),
        "share_inside_90_percent_range": inside / (count - 1 - count // 2),
    }


def measure_hour() -> dict[str, float]:
    """Processor seconds to simulate an hour of 1,000 adapters at 5 requests per second."""
    suite = msgspec.structs.replace(load_suite("tasks-1000"), duration_s=3600.0)
    experiment = prepare(suite)
    start = time.thread_time()
    outcome = run(experiment, "inlaid")
    seconds = time.thread_time() - start
    return {"processor_seconds": seconds, "requests": len(outcome.records), "steps": outcome.steps}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--policy", default=",".join(POLICIES), help="policies, comma-separated; options after a colon")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--tenants", type=int, default=1_000)
    parser.add_argument("--growth", action="store_true", help="also vary the crowd, under vtc and inlaid")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    usual = (args.running, args.waiting, args.tenants)
    cases = [(policy, *usual) for policy in args.policy.split(",")]
    for policy in ("vtc", "inlaid") if args.growth else ():
        cases += [(policy, running, 10_000, 1_000) for running in (16, 64, 512)]
        cases += [(policy, 256, waiting, 1_000) for waiting in (256, 1_000, 4_000, 100_000)]
        cases += [(policy, 256, 10_000, tenants) for tenants in (1, 10, 100, 10_000)]
    turns = [case for _ in range(args.runs) for case in cases]
    runs: dict[tuple[str, int, int, int], list[dict[str, float]]] = {case: [] for case in cases}
    for policy, running, waiting, tenants in Bar(turns, desc="scheduling"):
        figures = measure(policy, running, waiting, tenants, args.steps)
        runs[policy, running, waiting, tenants].append(figures)
    rows = [dict(zip(("policy", "running", "waiting", "tenants"), case)) | over_runs(runs[case]) for case in cases]
    taken = [run for some in runs.values() for run in some]
    least = min(run["least_reference_us"] for run in taken)
    slowdown = {
        "median": statistics.median(run["reference_us"] for run in taken) / least,
        "least": min(run["reference_us"] for run in taken) / least,
    }
    others = {"predictor": measure_predictor(), "simulated_hour": measure_hour()} if args.growth else {}
    busy = {"load_average": os.getloadavg()[0], "processors": os.cpu_count(), "slowdown": slowdown}
    record = {**provenance(seed=0), "steps": args.steps, "runs": args.runs, **busy, **others, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
