"""The GPU stage that holds the simulator against the engine, on a processor with a tiny model: all but the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from inlaid.sim.cost import load_cost
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


def test_the_stage_fits_a_machine_and_compares_both_policies(one_thread: None, tmp_path: Path) -> None:
    found = sched.run(tmp_path, "tiny", num_adapters=4, plan=PLAN, device="cpu", root=tmp_path)

    assert [row["policy"] for row in found["rows"]] == ["fcfs", "vtc"]
    for row in found["rows"]:
        assert row["engine"]["requests"] == row["simulator"]["requests"] > 5
        assert row["engine"]["throughput"] > 0
        assert row["fit_on_unseen_steps"]["steps"] > 50
    assert headline(found).startswith("fcfs ")
    off = max(abs(row[key]) for row in found["rows"] for key in ("throughput_error", "ttft_error"))
    assert found["within_10_percent"] == (off <= 0.1)
    machine = load_cost(str(tmp_path / "cpu.json"))
    assert machine.step + machine.decodes + machine.adapter_rows > 0
    assert machine.load_rank == load_cost("h200").load_rank
