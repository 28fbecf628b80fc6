"""What scheduling costs: microseconds of host time per step, by policy, and how it grows with the crowd.

Why it matters: with an overlapping runner the host has one device step (some milliseconds) to make the next batch; on
a small model or a fast device scheduling is what the device waits for. Nothing is computed here: tokens are drawn, so
all the time is the scheduler's, the ledger's, the policy's and the predictor's.

    python -m perf.scheduling.measure --out perf/results/scheduling-cost.json

The state is steady: 256 running, 10,000 waiting, 1,000 tenants, 100 adapters; an answer that ends is replaced by a new
arrival, so every step decodes, admits, ends and refills.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from inlaid.config import CacheConfig, SchedulerConfig
from inlaid.engine.predictor import Predictor
from inlaid.engine.request import NewRequest, Sampled, SamplingParams, StepResult
from inlaid.engine.scheduler import Scheduler
from inlaid.sim.provenance import provenance

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

    def unpin(self, identity: str) -> None: ...

    def rank(self, identity: str) -> int:
        return 16


class Crowd:
    """Draws requests: prompts of 64..191 tokens, outputs of 32..223, any tenant, any adapter."""

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


def measure(policy: str, running: int, waiting: int, tenants: int, steps: int) -> dict[str, float]:
    """Medians over steps, after the crowd has settled."""
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
    times: dict[str, list[float]] = {"schedule": [], "commit": [], "add": []}
    token = Sampled(5)
    settle = 300
    gc.collect()
    gc.freeze()
    for step in range(settle + steps):
        now += 0.02
        start = time.perf_counter()
        batch = scheduler.schedule(now)
        scheduled = time.perf_counter()
        assert batch is not None
        result = StepResult([token for work in batch.works if work.samples])
        before = time.perf_counter()
        outputs = scheduler.commit(batch, result, now)
        committed = time.perf_counter()
        ended = sum(output.finish_reason is not None for output in outputs)
        fresh = [crowd.draw() for _ in range(ended)]
        adding = time.perf_counter()
        for new in fresh:
            scheduler.add(new, now)
        added = time.perf_counter()
        if step >= settle:
            times["schedule"].append(scheduled - start)
            times["commit"].append(committed - before)
            if ended:
                times["add"].append((added - adding) / ended)
    gc.unfreeze()
    micro = {name: [1e6 * value for value in values] for name, values in times.items()}
    both = [a + b for a, b in zip(micro["schedule"], micro["commit"])]
    return {
        "schedule_us": statistics.median(micro["schedule"]),
        "schedule_p99_us": statistics.quantiles(micro["schedule"], n=100)[-1],
        "commit_us": statistics.median(micro["commit"]),
        "commit_p99_us": statistics.quantiles(micro["commit"], n=100)[-1],
        "step_us": statistics.median(both),
        "add_us": statistics.median(micro["add"] or [0.0]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=",".join(POLICIES), help="policies, comma-separated; options after a colon")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--tenants", type=int, default=1_000)
    parser.add_argument("--growth", action="store_true", help="also vary running, waiting and tenants under vtc")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    usual = (args.running, args.waiting, args.tenants)
    cases = [(policy, *usual) for policy in args.policy.split(",")]
    if args.growth:
        cases += [("vtc", running, 10_000, 1_000) for running in (16, 64, 512)]
        cases += [("vtc", 256, waiting, 1_000) for waiting in (100, 1_000, 100_000)]
        cases += [("vtc", 256, 10_000, tenants) for tenants in (1, 10, 100, 10_000)]
    rows: list[dict[str, Any]] = []
    for policy, running, waiting, tenants in tqdm(cases, desc="scheduling"):
        figures = measure(policy, running, waiting, tenants, args.steps)
        rows.append({"policy": policy, "running": running, "waiting": waiting, "tenants": tenants, **figures})
        tqdm.write(json.dumps(rows[-1]))
    record = {**provenance(seed=0), "steps": args.steps, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({"largest_schedule_us": max(row["schedule_us"] for row in rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
