"""Replicas on a virtual clock: every request is answered, and ours loads less and waits less than Ray's rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inlaid.cluster.placement import PLACEMENTS, make_placement
from inlaid.sim import cluster_sweep
from inlaid.sim.cluster import simulate_cluster
from inlaid.sim.cost import prices_of

RESULTS = Path(__file__).parents[2] / "perf" / "results"


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


def test_the_recorded_sweep_is_what_the_page_says_of_it() -> None:
    rows = json.loads((RESULTS / "sim-cluster.json").read_text())["rows"]
    first = {(row["rate"], row["zipf"], row["placement"]): row for row in cluster_sweep.of_all(rows)}
    points = {key[:2] for key in first}
    assert len(points) == 4
    for point in points:
        ours = first[(*point, "predicted")]
        assert ours["loads"] <= 0.7 * first[(*point, "least-loaded")]["loads"]
        best = max(row["attainment"] for key, row in first.items() if key[:2] == point and "attainment" in row)
        assert ours["attainment"] >= best - 0.003
        assert ours["ttft_p99_ms"] > first[(*point, cluster_sweep.ALONE)]["ttft_p99_ms"]
    for *_, ours_by_means, least, _, bound in cluster_sweep.gains(rows):
        assert float(ours_by_means) >= 2.0
        assert float(least) >= 1.7
        assert float(bound) > float(ours_by_means)
