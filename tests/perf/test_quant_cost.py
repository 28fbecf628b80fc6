"""The memory cases of perf.quant_cost, on blocks small enough to run here."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlaid.quant.record import Record
from perf import quant_cost
from perf.quant_cost import Case, peak, prepare

SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize("tasks", [0, 1])
def test_a_case_measures_the_next_task(tasks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_cost, "BLOCK", SMALL)
    case = Case(2, tasks, "minimax")
    prepare(case, tmp_path)
    assert (tmp_path / "out").exists() == bool(tasks)
    found = peak(case, tmp_path)
    record = Record.read(tmp_path / "out")
    assert (len(record.tasks), record.settings.aggregation) == (tasks + 1, "minimax")
    assert found["all_blocks"] == 2 * found["one_block"] == 2 * 4 * (4 * 128**2 + 3 * 128 * 256) / 2**20
    assert 0 < found["hidden_states_of_the_new_task"] <= 4 * 128 * 8192 / 2**20
    assert 0 < found["anonymous_at_the_start"] < found["resident_peak"]
