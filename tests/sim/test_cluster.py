"""Replicas on a virtual clock: every request is answered, and ours loads less and waits less than Ray's rule."""

from __future__ import annotations

import pytest

from inlaid.cluster.placement import PLACEMENTS, make_placement
from inlaid.sim import cluster_sweep
from inlaid.sim.cluster import simulate_cluster
from inlaid.sim.cost import prices_of


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, float]]:
    drawn = cluster_sweep.workload(3.0, 1.4, seed=5, adapters=200, calm=6.0, high=6.0, after=3.0)
    trace, setup = cluster_sweep.draw_trace(drawn), cluster_sweep.setup_of("a10g", drawn, slots=16)
    prices = prices_of(setup.cost)
    return {
        name: cluster_sweep.measure(
            simulate_cluster(trace, setup, make_placement(name, prices, 5, cluster_sweep.OBJECTIVE), 3)
        )
        for name in PLACEMENTS
    }


def test_every_placement_answers_all(rows: dict[str, dict[str, float]]) -> None:
    assert len({row["requests"] for row in rows.values()}) == 1
    assert all(row["loads"] > 0 for row in rows.values())


def test_ours_waits_less_than_rays_rule_and_loads_less_than_least_loaded(rows: dict[str, dict[str, float]]) -> None:
    assert rows["predicted"]["ttft_p99_ms"] < rows["multiplexed"]["ttft_p99_ms"]
    assert rows["predicted"]["loads"] < rows["least-loaded"]["loads"]
