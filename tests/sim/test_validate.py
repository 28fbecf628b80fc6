"""The simulator against the real engine on the bundled demo, coarsely: a short trace on two busy cores. The recorded
comparison is in perf/results."""

from __future__ import annotations

import argparse

import pytest
import torch

from inlaid.sim.validate import DEMO, load, validate


@pytest.mark.slow
def test_the_same_trace_on_engine_and_simulator_agrees() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # processor time is the clock
    try:
        loaded = load(DEMO, max_num_seqs=16, num_blocks=300, device="cpu")
        args = argparse.Namespace(
            max_num_seqs=16, seconds=4.0, rounds=2, loads="0.7", policy="fcfs", steps=None, cost=None
        )
        (row,) = validate(loaded, args)["rows"]
    finally:
        torch.set_num_threads(threads)
    assert row["engine"]["requests"] == row["simulator"]["requests"] > 20
    assert abs(row["throughput_error"]) < 0.15
    assert abs(row["ttft_error"]) < 0.5
    assert abs(row["fit_on_unseen_steps"]["relative_error_of_sum"]) < 0.4
