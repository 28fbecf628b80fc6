"""A model divided among several machines, by the cost model."""

from __future__ import annotations

import pytest

from inlaid.sim.cost import Load, load_cost


@pytest.mark.parametrize("machine", ["h200", "a10g"])
def test_members_share_a_step_and_wait_for_its_sums(machine: str) -> None:
    one = load_cost(machine)
    assert one.divided(1, 0.5) is one
    two = one.divided(2, 0.001)
    for load in (Load(decodes=64, output_context=64 * 300, adapters=32), Load(prefill_tokens=300, prefills=2)):
        whole = max(one.floor, one.step_seconds(load))
        assert two.step_seconds(load) == pytest.approx(whole / 2 + 0.001)
        assert two.host_seconds(load) == one.host_seconds(load)
    assert two.load_seconds(16) == pytest.approx(one.load_base + 16 * one.load_rank / 2)
