"""The GPU stage that holds the simulator against the engine, on a processor with a tiny model: all but the device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from inlaid.sim.cost import load_cost
from perf import rounds
from perf.gpu import sched
from perf.gpu.headlines import headline
from perf.validate import Plan

PLAN = Plan(loads=(0.6,), seconds=1.0, rounds=1, prompt=(4, 24), output=(4, 16))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # processor time is the clock
    yield
    torch.set_num_threads(threads)


def test_the_stage_fits_a_machine_and_compares_both_policies(
    one_thread: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sched.run(tmp_path, "tiny", num_adapters=4, plan=PLAN, device="cpu", root=tmp_path)

    assert [row["policy"] for row in found["rows"]] == ["fcfs", "vtc"]
    for row in found["rows"]:
        assert row["engine"]["requests"] == row["simulator"]["requests"] > 5
        assert row["engine"]["throughput"] > 0
        assert row["fit_on_unseen_steps"]["steps"] > 50
    assert headline(found).startswith("fcfs ")
    errors = ("throughput_error", "ttft_error", "latency_error")
    off = max(abs(row[key]) for row in found["rows"] for key in errors)
    assert found["within_5_percent"] == (off <= 0.05)
    machine = load_cost(str(tmp_path / "cpu.json"))
    assert machine.step + machine.decodes + machine.adapter_rows > 0
    assert machine.load_rank == load_cost("h200").load_rank
    capsys.readouterr()
    assert rounds.main([str(tmp_path / "sched-rounds.json"), "--machine", str(tmp_path / "cpu.json")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [row["engine"] for row in again] == [row["engine"] for row in found["rows"]]
    assert all(abs(row["throughput_error"]) < 0.5 for row in again)
