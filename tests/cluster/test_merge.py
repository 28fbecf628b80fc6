"""Answers of several replicas as one."""

from __future__ import annotations

from inlaid.cluster.merge import MERGED, merge_adapters
from inlaid.worker.messages import AdapterInfo


def info(tier: str, **fields: int) -> AdapterInfo:
    return AdapterInfo(name="a", identity="i", path="p", rank=8, bytes=1, tier=tier, **fields)


def test_figures_add_up_and_the_best_tier_is_told() -> None:
    assert MERGED["stats"]([{"running": 1, "waiting": 2}, {"running": 3, "waiting": 0}]) == {"running": 4, "waiting": 2}
    (one,) = merge_adapters({"r0": [info("disk", loads=1)], "r1": [info("device", loads=2, requests=3)]})
    assert (one.tier, one.loads, one.requests, one.replicas) == ("device", 3, 3, {"r0": "disk", "r1": "device"})


def test_what_is_listed_is_joined() -> None:
    assert MERGED["queue"]([[{"waited": 1.0}], [{"waited": 3.0}]]) == [{"waited": 3.0}, {"waited": 1.0}]
    assert MERGED["steps"]([[1], [2, 3]]) == [1, 2, 3]
    one, other = {"t": [1.0, 2.0]}, {"t": [3.0, 0.0], "u": [0.0, 1.0]}
    merged = MERGED["service_history"]([{"pace": 1.0, "tenants": one}, {"pace": 1.0, "tenants": other}])
    assert merged == {"pace": 1.0, "tenants": {"t": [4.0, 2.0], "u": [0.0, 1.0]}}
