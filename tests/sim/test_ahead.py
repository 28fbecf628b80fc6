"""A host that works one step ahead of its device: its part and the device's are found in the steps that it measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import pytest

from inlaid.engine.scheduler import Scheduler
from inlaid.engine.step_log import Load, Step, StepLog
from inlaid.sim.ahead import device_steps, is_ahead, sure_decodes
from inlaid.sim.cost import CostModel
from inlaid.sim.fit import errors, fit
from inlaid.sim.request_log import Arrival, as_arrivals
from inlaid.sim.simulate import Setup, simulate
from inlaid.workload.arrivals import Arrivals
from inlaid.workload.lengths import Lengths
from inlaid.workload.plan import plan
from inlaid.workload.popularity import AdapterChoice
from inlaid.workload.prompts import LengthsOnly
from inlaid.workload.spec import Stream, Workload

NAMES = ("a", "b", "c", "d")
TRUE = CostModel(
    "true", "", step=3e-3, prefill_tokens=2e-5, prefills=2e-4, decodes=2.5e-5, prompt_context=4e-8, ranks=1e-5,
    host=4e-4, host_prompts=5e-3, host_rows=3e-6,
)  # fmt: skip


def trace_of(rate: float, seed: int, seconds: float = 2.0) -> list[Arrival]:
    streams = [
        Stream(Arrivals("poisson", rate=rate), AdapterChoice("uniform"), Lengths("uniform", low=16, high=511),
               Lengths("uniform", low=8, high=127), 0.0, seconds)
    ]  # fmt: skip
    return as_arrivals(plan(Workload(streams, seed), list(NAMES), LengthsOnly()), NAMES, real=True)


def served(cost: CostModel, trace: Sequence[Arrival]) -> tuple[list[Step], tuple[float, float, float]]:
    """Serve a trace on the simulator; return the steps that its engine measured, and its figures."""
    logs = []

    class Measured(Scheduler):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            self.step_log = StepLog(self.adapters.rank, every=1, kept=None)
            logs.append(self.step_log)

    ranks = {name: 8 * (place + 1) for place, name in enumerate(NAMES)}
    setup = Setup(cost=cost, resident=NAMES, ranks=ranks, num_tokens=400_000, overlap=True, scheduler_type=Measured)
    made = simulate(trace, setup)
    first = fmean(record.ttft for record in made.records if record.ttft is not None)
    last = fmean(record.latency for record in made.records if record.latency is not None)
    return logs[0].list(), (made.end, first, last)


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return [step for seed, rate in enumerate((25.0, 60.0, 85.0)) for step in served(TRUE, trace_of(rate, seed))[0]]


def test_both_parts_are_found_in_what_the_engine_measures(steps: list[Step]) -> None:
    assert is_ahead(steps)
    found = fit(steps, "found", "")
    for term in ("step", "prefill_tokens", "decodes", "host", "host_prompts"):
        assert getattr(found, term) == pytest.approx(getattr(TRUE, term), rel=0.05), term
    assert errors(found, steps)["r_squared"] > 0.99


def test_traffic_that_the_fit_has_not_seen_is_foretold(steps: list[Step]) -> None:
    found, trace = fit(steps, "found", ""), trace_of(50.0, 9)
    real, model = (served(cost, trace)[1] for cost in (TRUE, found))
    assert model == pytest.approx(real, rel=0.02)


def test_steps_of_a_host_that_makes_one_at_a_time_are_left_as_they_are(steps: list[Step]) -> None:
    alone = [Step(step.seconds, step.load) for step in steps]
    assert not is_ahead(alone)
    assert fit(alone, "alone", "").host == 0.0


def test_a_step_whose_end_was_seen_late_gives_back_what_the_next_had() -> None:
    decode, prompt = Load(decodes=1), Load(prefills=1, prefill_tokens=100)
    steps = [
        Step(3e-3, decode, 4e-4, 2e-3, 1),
        Step(6e-3, decode, 4e-4, 0.0, 2),  # the host took 6 ms to launch the prompt
        Step(2e-3, prompt, 6e-3, 1e-3, 3),
        Step(3e-3, decode, 4e-4, None, 4),
    ]
    assert [(step.number, step.seconds) for step in device_steps(steps, lambda load: 3e-3)] == [
        (3, pytest.approx(5e-3))
    ]
    assert sure_decodes(steps) == []
