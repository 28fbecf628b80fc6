"""The stage of two replicas on two GPUs, as far as a CPU can run it: one replica of a tiny model, and a second one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perf.gpu import bench, cluster, serving


def test_the_stage_is_one_of_the_benchs() -> None:
    assert {"cluster-8b", "cluster-tiny"} <= bench.LIMITS.keys()


@pytest.mark.long
@pytest.mark.timeout(400)
def test_two_replicas_are_measured_against_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "ROOT", tmp_path)
    monkeypatch.setattr(cluster, "ROOT", tmp_path)
    monkeypatch.setattr(serving, "DEVICE", ("--device", "cpu", "--num-blocks", "400"))
    monkeypatch.setattr(cluster, "ADAPTERS", 4)
    monkeypatch.setattr(cluster, "LOADS", ((2, 4), (4, 8)))
    kept: list[dict[str, Any]] = []
    report = cluster.run("tiny", lambda so_far: kept.append(dict(so_far)))
    assert "error" not in report, report
    assert [(row["replicas"], row["requests"]) for row in report["rows"]] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    assert report["second_replica_serves_s"] > 0
    assert report["two_over_one"] > 0
    assert len(kept) == 4
