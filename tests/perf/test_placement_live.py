"""The simulated side of the check of placement against live replicas; the live side is a measurement."""

from __future__ import annotations

import pytest

from inlaid.sim.cost import CostModel
from inlaid.sim.placement import Call
from perf.placement_live import PLACEMENTS, PROMPT, simulated

COST = CostModel("test", "", step=0.01, prefill_tokens=1e-4, decodes=1e-3)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_alone_each_call_takes_its_prompt_and_its_decodes(placement: str) -> None:
    calls = [Call(1.0 * number, number, 8, 5) for number in range(6)]
    found = simulated(placement, calls, {"a": 8, "b": 16}, COST, 0)
    alone = (COST.step + PROMPT * COST.prefill_tokens + 4 * (COST.step + COST.decodes)) / 5
    assert found == [pytest.approx(alone, rel=0.05)] * 6
