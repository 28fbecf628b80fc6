"""The four modes with loads of known length on a virtual clock, and that each mode serves every request."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.adapters.modes import CACHED, CPU_ASSIST, ON_DEMAND, PIPELINED, SIMULATED
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.sim.cost import CostModel
from inlaid.sim.request_log import Arrival
from inlaid.sim.simulate import Setup, simulate
from tests.examples import examples

COST = CostModel(name="flat", source="test", step=0.1, load_base=0.4)


def request(name: str, adapter: str | None, outputs: int = 1, prompt: int = 10) -> NewRequest:
    params = SamplingParams(max_tokens=outputs, ignore_eos=True)
    return NewRequest(id=name, prompt=[0] * prompt, params=params, adapter=adapter, true_output_len=outputs)


def ttft(mode: str, cost: CostModel = COST, *requests: NewRequest) -> dict[str, float | None]:
    trace = [Arrival(0.0, each) for each in requests or (request("r", "a"),)]
    outcome = simulate(trace, Setup(cost, adapter_mode=mode))
    return {record.id: record.ttft for record in outcome.records}


def test_a_lone_request_waits_as_long_as_its_mode_says() -> None:
    """0.4 s of load in four groups, 0.1 s of prefill: all of the one, then of the other; or group after group."""
    times = {mode: ttft(mode)["r"] for mode in SIMULATED}
    assert times[CACHED] == pytest.approx(0.1)
    assert times[ON_DEMAND] == pytest.approx(0.5, abs=1e-4)
    assert times[PIPELINED] == pytest.approx(0.425, abs=1e-4)
    assert times[CPU_ASSIST] == pytest.approx(0.1, abs=1e-4)


def test_the_cpus_help_pays_only_while_it_is_faster_than_the_link() -> None:
    """10 rows of rank 16 are 160: a second of the CPU for all layers loses, a tenth of one wins. A layer group that
    landed meanwhile is the device's."""
    slow, fast = (replace(COST, assist=seconds / 160) for seconds in (1.0, 0.1))
    assert ttft(CPU_ASSIST, fast)["r"] == pytest.approx(0.2, abs=1e-4)
    assert ttft(CPU_ASSIST, slow)["r"] == pytest.approx(0.6, abs=1e-4)
    assert ttft(PIPELINED, slow)["r"] == pytest.approx(0.425, abs=1e-4)


@pytest.mark.parametrize("mode", [ON_DEMAND, PIPELINED])
def test_nobody_waits_for_anothers_load_before_it_may_start(mode: str) -> None:
    times = ttft(mode, COST, request("slow", "a"), request("base", None))
    assert times["base"] == pytest.approx(0.1)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="known: cached, on-demand, pipelined, cpu-assist"):
        simulate([], Setup(COST, adapter_mode="lazy"))


@given(
    mode=st.sampled_from(SIMULATED),
    asks=st.lists(st.tuples(st.floats(0, 3), st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=12),
    slots=st.integers(1, 3),
    load=st.floats(0.001, 1.0),
    assist=st.sampled_from([0.0, 0.001]),
)
@examples(80)
def test_everyone_is_served_in_every_mode(
    mode: str, asks: list[tuple[float, int, int]], slots: int, load: float, assist: float
) -> None:
    cost = CostModel(name="random", source="test", step=0.02, load_base=load, assist=assist)
    trace = [
        Arrival(when, request(f"r{n}", f"a{adapter}" if adapter else None, outputs))
        for n, (when, adapter, outputs) in enumerate(sorted(asks))
    ]
    outcome = simulate(trace, Setup(cost, slots=slots, adapter_mode=mode))
    assert len(outcome.records) == len(asks)
    assert all(record.finish is not None and not record.refused for record in outcome.records)
    assert (outcome.loads == 0) == (mode == CACHED or not any(adapter for _, adapter, _ in asks))
