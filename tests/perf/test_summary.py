"""The summary: vLLM's names, and figures recomputed here by other means."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from inlaid.workload.spec import Objective
from perf.records import Record, read_records, write_records
from perf.summary import Options, as_table, main, summarize

VLLM_FIELDS = {
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
}
LATENCIES = [
    f"{spread}_{name}_ms" for spread in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")
]
VLLM_DETAILS = {"input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors"}


def some_records(count: int = 40) -> list[Record]:
    rng = np.random.default_rng(5)
    records = []
    for i in range(count):
        gaps = rng.exponential(0.02, rng.integers(1, 9)).round(6).tolist()
        ttft, sent = float(rng.exponential(0.2)), i * 0.1 + 0.001
        name = "abc"[i % 3]
        records.append(
            Record(
                i,
                name,
                f"t-{name}",
                "default",
                i * 0.1,
                sent,
                sent + ttft + sum(gaps),
                "ok",
                7,
                len(gaps) + 1,
                9,
                ttft,
                gaps,
                200,
            )
        )
    return records


def test_vllms_names_are_there() -> None:
    summary = summarize(some_records(), Options(detailed=True))
    assert summary.keys() >= VLLM_FIELDS.union(LATENCIES, VLLM_DETAILS)
    assert not summarize(some_records(), Options()).keys() & VLLM_DETAILS


def test_figures_agree_with_the_standard_library() -> None:
    records = some_records()
    summary = summarize(records, Options())
    ttfts = [record.ttft * 1000 for record in records if record.ttft is not None]
    assert summary["mean_ttft_ms"] == pytest.approx(statistics.fmean(ttfts))
    assert summary["median_ttft_ms"] == pytest.approx(statistics.median(ttfts))
    assert summary["std_ttft_ms"] == pytest.approx(statistics.pstdev(ttfts))
    cuts = statistics.quantiles(ttfts, n=100, method="inclusive")
    assert summary["p99_ttft_ms"] == pytest.approx(cuts[98])
    gaps = [gap * 1000 for record in records for gap in record.itls]
    assert summary["mean_itl_ms"] == pytest.approx(statistics.fmean(gaps))
    tpots = [1000 * sum(r.itls) / len(r.itls) for r in records]
    assert summary["mean_tpot_ms"] == pytest.approx(statistics.fmean(tpots))
    end = max(record.finished for record in records)
    assert summary["request_throughput"] == pytest.approx(40 / end)
    assert summary["offered_rate"] == pytest.approx(10)


def test_groups_add_up_to_the_whole() -> None:
    summary = summarize(some_records(), Options())
    for kind in ("per_adapter", "per_tenant"):
        for key in ("completed", "failed", "total_input_tokens", "total_output_tokens"):
            assert sum(group[key] for group in summary[kind].values()) == summary[key]
    assert set(summary["per_tenant"]) == {"t-a", "t-b", "t-c"}


def test_warmup_is_left_out() -> None:
    slow = Record(-1, "a", "a", "default", 0, 0, 99, "ok", 1, 1, 1, 99.0, [], 200, warmup=True)
    plain, warmed = summarize(some_records(), Options()), summarize([*some_records(), slow], Options())
    assert json.dumps(plain) == json.dumps(warmed)
    with pytest.raises(ValueError, match="no request was measured"):
        summarize([slow], Options())


def test_a_task_with_an_unanswered_request_is_not_complete() -> None:
    cut = Record(99, "a", "t-a", "default", 1, 1, 2, "cut", 5, 1, 9, 0.5, [], 200)
    jct = summarize([*some_records(), cut], Options())["jct"]
    assert (jct["tasks"], jct["complete"], jct["per_task_s"]["a"]) == (3, 2, None)


def test_nothing_answered_makes_no_figure_up() -> None:
    failed = [Record(i, "a", "a", "default", i, i, i + 1, "error", 5, 0, 9) for i in range(3)]
    summary = summarize(failed, Options(objectives={"default": Objective(ttft_ms=9)}))
    assert (summary["completed"], summary["failed"], summary["request_goodput"]) == (0, 3, 0)
    assert "mean_ttft_ms" not in summary
    assert "0 / 3" in as_table(summary)


def test_goodput_counts_only_what_met_its_objective() -> None:
    records = some_records()
    limit = statistics.median(record.ttft or 0 for record in records) * 1000
    summary = summarize(records, Options(objectives={"default": Objective(ttft_ms=limit)}))
    assert summary["request_goodput"] == pytest.approx(summary["request_throughput"] / 2)
    assert summary["slo"]["attainment"] == pytest.approx(0.5)


def test_records_survive_a_cut_last_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, some_records())
    path.write_bytes(path.read_bytes()[:-20])
    assert read_records(path) == some_records()[:-1]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, some_records())
    assert main([str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["completed"] == 40
    path.write_text('{"no": "record"}\n')
    assert main([str(path)]) == 2
    assert "not a file of request records" in capsys.readouterr().err
