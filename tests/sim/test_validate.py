"""The simulator against the real engine on the bundled demo. Under a clock that counts the cost model's seconds the two
must agree; with the seconds of this machine, coarsely. The recorded comparison is in perf/results."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from inlaid.engine.process import Loaded
from inlaid.engine.request import Batch, Runner, StepResult
from inlaid.sim.cost import CostModel, Load, load_cost
from inlaid.sim.replay import mixed_trace, replay
from inlaid.sim.validate import DEMO, fresh_engine, load, ranks_of, simulated, summary, validate

ATTEMPTS = 3  # a machine whose speed changes within seconds may spoil one comparison of seconds


@dataclass
class CountedClock:
    """Time passes when a step is collected, and when the replay waits."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_to(self, moment: float) -> None:
        self.now = max(self.now, moment)


class CountedRunner:
    """The real runner; a step takes what the cost model says."""

    overlap = False

    def __init__(self, runner: Runner, clock: CountedClock, cost: CostModel, ranks: dict[str, int]) -> None:
        self._runner, self._clock, self._cost, self._ranks = runner, clock, cost, ranks

    def submit(self, batch: Batch) -> Any:
        return Load.of(batch, self._ranks), self._runner.submit(batch)

    def collect(self, ticket: Any) -> StepResult:
        load, inner = ticket
        result = self._runner.collect(inner)
        self._clock.now += self._cost.step_seconds(load)
        return result


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # processor time is the clock
    yield load(DEMO, max_num_seqs=16, num_blocks=300, device="cpu")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("policy", ["fcfs", "vtc"])
def test_given_the_seconds_of_a_step_engine_and_simulator_agree(loaded: Loaded, policy: str) -> None:
    names = [info.name for info in loaded.adapters.list()]
    ranks = ranks_of(loaded, names)
    cost = load_cost("a10g")
    trace = mixed_trace(names, loaded.model.vocab_size, duration=12.0, rate=8.0, seed=5)
    clock = CountedClock()
    engine = fresh_engine(loaded, policy, clock)
    engine.runner = CountedRunner(engine.runner, clock, cost, ranks)

    done = replay(engine, trace, ranks, clock)
    records, end = simulated(trace, loaded, cost, policy)

    real, model = summary(done.records, done.seconds), summary(records, end)
    assert real["requests"] == model["requests"] == len(trace)
    for figure in ("throughput", "mean_ttft", "mean_latency"):
        assert model[figure] == pytest.approx(real[figure], rel=0.02), figure


@pytest.mark.slow
def test_the_same_trace_on_engine_and_simulator_agrees(loaded: Loaded) -> None:
    args = argparse.Namespace(max_num_seqs=16, seconds=4.0, rounds=2, loads="0.7", policy="fcfs", steps=None, cost=None)
    seen = []
    for _ in range(ATTEMPTS):
        (row,) = validate(loaded, args)["rows"]
        assert row["engine"]["requests"] == row["simulator"]["requests"] > 20
        off = {
            "throughput": row["throughput_error"],
            "ttft": row["ttft_error"],
            "steps": row["fit_on_unseen_steps"]["relative_error_of_sum"],
        }
        if abs(off["throughput"]) < 0.15 and abs(off["ttft"]) < 0.5 and abs(off["steps"]) < 0.4:
            return
        seen.append(off)
    pytest.fail(f"the simulator was off in each of {ATTEMPTS} comparisons: {seen}")
