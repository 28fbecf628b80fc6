"""The headline's stage with a tiny shape on the CPU: three systems, the same requests for each, and their figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from perf.gpu import headline, headline_table, random_model


def test_three_systems_serve_the_same_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAID_BENCH_ROOT", str(tmp_path))  # of the engines' processes
    monkeypatch.setattr(headline, "ROOT", tmp_path)
    kept: list[dict[str, Any]] = []
    found = headline.run("tiny", kept.append)
    assert "error" not in found
    rows = found["tiny"]["rows"]
    assert kept[-1]["tiny"]["rows"] == rows
    case = headline.CASES["tiny"]
    of = {system.name: [row for row in rows if row["system"] == system.name] for system in headline.SYSTEMS}
    assert len(of["S-LoRA-style"]) == 1 + len(of["inlaid"])  # it is served lightly too, for the objective
    assert len(of["inlaid"]) == len(of["16 bits"]) == 1 + len(case.rates) + len(case.others)
    for ours, theirs in zip(of["inlaid"][1:], of["S-LoRA-style"][2:]):
        assert (ours["tasks"], ours["rate"], ours["requests"]) == (theirs["tasks"], theirs["rate"], theirs["requests"])
        assert 0 <= ours["slo_attainment"] <= 1
    assert found["tiny"]["kv_tokens"][4] > found["tiny"]["kv_tokens"][16]  # fewer bytes of weights


def test_a_memory_that_does_not_hold_the_base_is_an_error_of_that_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headline, "ROOT", tmp_path)
    random_model.write_dense(headline.model_folder("tiny", 16), "tiny")
    with pytest.raises(ValueError, match=r"0\.001 GiB do not hold a tiny of 16 bits"):
        headline._build(replace(headline.CASES["tiny"], memory_gib=0.001), 16)


def test_figures_of_records() -> None:
    records = [("a", 0.0, 1.0, 2.0, 10), ("a", 1.0, 1.5, 5.0, 20), ("b", 2.0, 2.5, 4.0, 10)]
    found = headline.figures(records, slo=2.0)
    assert found["slo_attainment"] == pytest.approx(2 / 3)
    assert found["output_tokens_per_second"] == 40 / 5.0
    assert found["mean_latency_s"] == pytest.approx((2 + 4 + 2) / 3)
    assert found["jct_s"] == pytest.approx((5 + 2) / 2)


def test_the_table_sets_each_system_beside_s_lora_style_serving() -> None:
    figures = {"output_tokens_per_second": 100.0, "mean_latency_s": 2.0, "jct_s": 4.0, "ttft_p99_ms": 9.0, "tasks": 100}
    theirs = {"system": headline.SLORA.name, "rate": 5.0, "slo_attainment": 0.4, **figures}
    ours = {
        **theirs,
        "system": "inlaid",
        "output_tokens_per_second": 150.0,
        "mean_latency_s": 1.0,
        "slo_attainment": 0.8,
    }
    light = {"system": headline.SLORA.name, "rate": 1.0, **figures}  # it has no objective, and no counterpart
    (better,) = headline_table.ratios([theirs, light, ours])
    assert [better[name] for name, *_ in headline_table.PAPER] == [1.5, 2.0, 1.0, 2.0]
    made = {
        "gpu": "H200, 1",
        "commit": "abc",
        "command": "c",
        "result": {"7b": {"rows": [theirs, light, ours]}, "write_s": 1},
    }
    text = headline_table.table(made)
    assert "| 7b | 100 | 5 | inlaid | 1.50 | 2.00 | 1.00 | 2.00 |" in text
