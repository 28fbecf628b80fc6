"""The comparison of speculation with plain decoding: its table, and the recorded drafts at machines' step times."""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

import pytest

from inlaid.engine.step_log import Load
from inlaid.sim.closed_loop import Served, serve
from inlaid.sim.cost import CostModel
from inlaid.sim.traced import Acceptances
from perf import speculation
from perf.speculation_model import CONCURRENCIES, RESULTS, TRACE, h200, settings, this_machine

RECORDED = json.loads((RESULTS / "speculation-cpu.json").read_text())
MACHINES = {
    "layers": (h200(), True),
    "one kernel": (h200("auto"), True),
    "cpu": (this_machine(RECORDED["step_times"]), False),
}


def test_the_recorded_table_is_made_of_the_recorded_figures() -> None:
    assert speculation.as_markdown(RECORDED) == (RESULTS / "speculation-cpu.md").read_text()


def test_the_tables_of_an_h200_are_what_was_measured() -> None:
    """Steps with guesses were measured with the host's work before them, within what the captured sizes blur."""
    stages = json.loads((RESULTS / "speculation-h200.json").read_text())["stages"]
    for stage in stages.values():
        found = stage["result"]
        steps = h200(found["decode_kernel"])
        for row in found["rows"]:
            requests, guesses = row["concurrency"], row["guesses"]
            plain = Load(decodes=requests)
            assert 1e3 * steps.step_seconds(plain) == pytest.approx(row["plain"]["median_step_ms"], rel=0.05)
            if row["wrong"] == "none" and (requests, guesses) != (64, 7):  # there are not as many rows
                load = Load(decodes=requests, guesses=requests * guesses)
                took = 1e3 * (steps.step_seconds(load) + steps.host_seconds(load))
                assert took == pytest.approx(row["median_step_ms"], rel=0.15), (requests, guesses)


@pytest.fixture(scope="module")
def trace() -> Acceptances:
    return Acceptances.load(TRACE)


def served(trace: Acceptances, cost: CostModel, overlap: bool, concurrency: int) -> dict[str, Served]:
    """Serve eight answers of each task, without drafts, with as many as pay, and with all."""
    number = max(96, 4 * concurrency)
    return {
        length: serve(
            cost, trace, concurrency, number, overlap=overlap, speculation=None if length == "off" else settings(length)
        )
        for length in ("off", "auto", "fixed")
    }  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("concurrency", CONCURRENCIES)
def test_no_load_is_served_slower_and_what_pays_is_taken(trace: Acceptances, machine: str, concurrency: int) -> None:
    found = served(trace, *MACHINES[machine], concurrency)
    assert found["auto"].tokens == found["off"].tokens
    assert found["auto"].rate >= 0.98 * found["off"].rate
    assert found["auto"].rate >= 0.95 * max(found["fixed"].rate, found["off"].rate)


@pytest.mark.parametrize("kernel", ["layers", "auto"])
@pytest.mark.parametrize(("concurrency", "number"), [(4, 24), (16, 32), (64, 128)])
def test_what_is_learned_first_costs_little(trace: Acceptances, kernel: str, concurrency: int, number: int) -> None:
    """Serve as few requests as the H200's first round had: some hundred steps."""
    off = serve(h200(kernel), trace, concurrency, number, overlap=True)
    on = serve(h200(kernel), trace, concurrency, number, overlap=True, speculation=settings("auto"))
    assert on.rate >= 0.98 * off.rate


def test_on_an_h200_a_request_alone_is_served_faster(trace: Acceptances) -> None:
    found = served(trace, h200(), True, 1)
    assert found["auto"].rate >= 1.4 * found["off"].rate
    assert found["auto"].steps <= found["off"].steps / 1.6


class Busy(CostModel):
    """A machine that others use: each step takes some more or less, some far more, and all of it comes in waves."""

    def __init__(self, cost: CostModel, seed: int) -> None:
        super().__init__(**{name: getattr(cost, name) for name in cost.__dataclass_fields__})
        object.__setattr__(self, "_random", Random(seed))
        object.__setattr__(self, "_passed", 0)

    def step_seconds(self, load: Load) -> float:
        random: Any = self._random  # type: ignore[attr-defined]
        object.__setattr__(self, "_passed", self._passed + 1)  # type: ignore[has-type]
        hiccup = 1.0 + (2.0 * random.random() if random.random() < 0.05 else 0.0)
        wave = 1.0 + 0.3 * math.sin(self._passed / 70)
        return super().step_seconds(load) * random.lognormvariate(0.0, 0.08) * hiccup * wave


@pytest.mark.parametrize("concurrency", CONCURRENCIES)
def test_on_a_busy_machine_noise_is_not_taken_for_a_gain(trace: Acceptances, concurrency: int) -> None:
    """Count what guesses cost in steps of a quiet machine, as noise itself moves a short run by some percent."""
    cost, overlap = MACHINES["cpu"]
    rates = []
    for seed in range(3):
        quiet = Counted(cost, seed)
        on = serve(quiet, trace, concurrency, max(96, 4 * concurrency), overlap=overlap, speculation=settings("auto"))
        rates.append(on.tokens / quiet.total)
    off = serve(cost, trace, concurrency, max(96, 4 * concurrency), overlap=overlap)
    assert sum(rates) / len(rates) >= 0.98 * off.rate


class Counted(Busy):
    """A busy machine that counts what a quiet one would have taken."""

    def __init__(self, cost: CostModel, seed: int) -> None:
        super().__init__(cost, seed)
        object.__setattr__(self, "total", 0.0)

    def step_seconds(self, load: Load) -> float:
        object.__setattr__(self, "total", self.total + CostModel.step_seconds(self, load))  # type: ignore[attr-defined]
        return super().step_seconds(load)


def test_choosing_is_timed_by_request_and_step() -> None:
    assert all(value > 0 for value in speculation.host_cost(4, 3).values())
