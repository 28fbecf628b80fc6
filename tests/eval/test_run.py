"""The whole harness on the demo, small: reports, going on after a kill, planted faults that it and the gate find."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval import run
from eval.engine import EngineBackend
from eval.task import ROOT
from inlaid import LLM
from inlaid.adapters.gate import GateError, check
from inlaid.adapters.peft import read_adapter
from inlaid.config import AdapterConfig, CacheConfig, EngineConfig
from inlaid.model.spec import read_spec

BASE = ROOT / "models/demo/base"
ADAPTERS = ROOT / "models/demo/adapters"


def evaluate(folder: Path, *arguments: str) -> dict[str, Any]:
    """One small run; its report."""
    common = ["--cache", str(folder / "cache"), "--out", str(folder / "report"), "--workers", "0", "--no-figures"]
    assert run.main([*common, "--examples", "4", *arguments]) in (0, 1)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def record_of(report: dict[str, Any], task: str, variant: str = "fp16", bits: int = 16) -> dict[str, Any]:
    (found,) = (r for r in report["records"] if (r["task"], r["variant"], r["bits"]) == (task, variant, bits))
    return dict(found)


def refusal(folder: Path, record: dict[str, Any], max_drop: float = 2) -> str:
    with pytest.raises(GateError) as raised:
        check(folder / "report.json", record["base_version"], record["adapter_identity"], max_drop)
    return str(raised.value)


def test_the_report_holds_what_people_and_the_gate_need(tmp_path: Path) -> None:
    report = evaluate(
        tmp_path,
        "--tasks",
        "to_velar,code",
        "--variants",
        "fp16,rtn",
        "--bits",
        "2",
        "--examples",
        "8",
        "--max-drop",
        "2",
    )
    assert [(row["variant"], row["bits"]) for row in report["summary"]] == [("fp16", 16), ("rtn", 2)]
    good, bad = record_of(report, "code"), record_of(report, "code", "rtn", 2)
    assert good["score"] > 80
    assert good["low"] <= good["score"] <= good["high"]
    assert good["drop"] == 0
    assert bad["drop"] > 50
    assert bad["p_holm"] < 0.05
    assert report["summary"][1]["worst_drop"] >= report["summary"][1]["average_drop"]
    assert set(good["also"]) == {"exact_match", "perplexity"}
    assert report["provenance"]["packages"]["torch"] == torch.__version__
    check(tmp_path / "report.json", good["base_version"], good["adapter_identity"], 2)
    assert re.search(r"task code \(pass_at_1 .*\) drops .* more than the 2 allowed", refusal(tmp_path, bad))
    engine_refuses_by(tmp_path / "report.json", next((tmp_path / "cache/bases").glob("rtn-2-*")))
    page = (tmp_path / "report.md").read_text()
    assert "| rtn | 2 |" in page
    assert "to_velar" in page


def engine_refuses_by(report: Path, ruined: Path) -> None:
    """Start the engine as `inlaid serve --require-eval REPORT --max-drop 2` does.

    Full precision serves, the ruined base does not, and an adapter that was never evaluated is told so.
    """
    gated = AdapterConfig(require_eval=str(report), max_drop=2.0)
    code = {"code": str(ADAPTERS / "code")}
    small = CacheConfig(cpu_memory_gib=0.05)
    LLM(str(BASE), code, config=EngineConfig(model=str(BASE), adapters=gated, cache=small))
    with pytest.raises(GateError, match=r"task code \(pass_at_1 .*more than the 2 allowed"):
        LLM(str(ruined), code, config=EngineConfig(model=str(ruined), adapters=gated, cache=small))
    with pytest.raises(GateError, match="not with these adapter weights"):
        LLM(
            str(BASE),
            {"maths": str(ADAPTERS / "maths")},
            config=EngineConfig(model=str(BASE), adapters=gated, cache=small),
        )


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of the second base: only what was not kept is asked again, and the scores are the same."""
    arguments = ("--tasks", "to_velar,code", "--variants", "fp16,rtn", "--bits", "3", "--examples", "2")
    calm = evaluate(tmp_path / "calm", *arguments)
    asked: list[int] = []
    plain = EngineBackend.grade
    monkeypatch.setattr("eval.engine.setting", lambda: "the same code throughout")

    def counting(die_at: int) -> Callable[..., Any]:
        def grade(self: EngineBackend, asks: Any, continuations: Any) -> Any:
            if len(asked) + 1 == die_at:
                raise KeyboardInterrupt
            asked.append(len(asks))
            return plain(self, asks, continuations)

        return grade

    monkeypatch.setattr(EngineBackend, "grade", counting(die_at=3))
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "killed", *arguments)
    assert asked[0] > 0
    first, asked[:] = sum(asked), []
    monkeypatch.setattr(EngineBackend, "grade", counting(die_at=0))
    resumed = evaluate(tmp_path / "killed", *arguments)
    assert first + sum(asked) == 2 * (2 * 2 + 2)
    assert [without_place(r) for r in resumed["records"]] == [without_place(r) for r in calm["records"]]
    asked[:] = []
    evaluate(tmp_path / "killed", *arguments)
    assert asked == []


def without_place(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "base_version"}


def copy_adapter(name: str, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copytree(ADAPTERS / name, folder)
    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


def zero_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * 0 if ".lora_B." in name else tensor for name, tensor in tensors.items()}


def of_another_base(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what training on other weights leaves: factors of the same size that point elsewhere."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor[:, torch.randperm(tensor.shape[1], generator=generator)] if ".lora_A." in name else tensor
        for name, tensor in tensors.items()
    }


ZERO = (zero_b, ("does no better than the base alone", "changes nothing"))
FOREIGN = (of_another_base, ("does no better than the base alone",))


@pytest.mark.parametrize(
    ("change", "reasons", "backend"),
    [
        (*ZERO, "engine"),
        (*FOREIGN, "engine"),
        (*ZERO, "oracle"),
        pytest.param(*FOREIGN, "oracle", marks=pytest.mark.long),
    ],
)
def test_a_dead_or_foreign_adapter_is_found(
    tmp_path: Path, backend: str, change: Callable[..., Any], reasons: tuple[str, ...]
) -> None:
    folder = copy_adapter("to_velar", tmp_path / "planted", change)
    good = f"code={ADAPTERS / 'code'}"
    report = evaluate(
        tmp_path, "--tasks", "to_velar,code", "--adapter", f"to_velar={folder}", "--adapter", good,
        "--variants", "fp16,rtn", "--bits", "8", "--backend", backend,
    )  # fmt: skip
    for variant, bits in (("fp16", 16), ("rtn", 8)):
        planted, sound = record_of(report, "to_velar", variant, bits), record_of(report, "code", variant, bits)
        assert any(reason in fault for fault in planted["faults"] for reason in reasons)
        assert "task to_velar" in refusal(tmp_path, planted)
        assert not sound["faults"]
        check(tmp_path / "report.json", sound["base_version"], sound["adapter_identity"], 5)
    assert "**to_velar**" in (tmp_path / "report.md").read_text()


def test_swapped_adapters_are_found(tmp_path: Path) -> None:
    report = evaluate(
        tmp_path, "--tasks", "to_quorin,medical", "--adapter", f"to_quorin={ADAPTERS / 'medical'}",
        "--adapter", f"medical={ADAPTERS / 'to_quorin'}", "--variants", "fp16",
    )  # fmt: skip
    assert report["summary"][0]["faults"] == ["medical", "to_quorin"]
    assert "does no better than the base alone" in refusal(tmp_path, record_of(report, "medical"))


def test_swapped_labels_are_found(tmp_path: Path) -> None:
    """Each example gets the reference of the next one: the adapter is right, the data is not."""
    lines = [json.loads(line) for line in (ROOT / "data/to_velar/eval.jsonl").read_text().splitlines()[:4]]
    swapped = [{**line, "completion": lines[index - 1]["completion"]} for index, line in enumerate(lines)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in swapped))
    text = (ROOT / "eval/tasks/to_velar.toml").read_text()
    text = re.sub(r'file = ".*"', f"file = {json.dumps(str(tmp_path / 'rows.jsonl'))}", text)
    (tmp_path / "swapped.toml").write_text(text)
    report = evaluate(
        tmp_path, "--tasks", f"{tmp_path / 'swapped.toml'}:to_velar,code", "--variants", "fp16",
        "--adapter", f"to_velar={ADAPTERS / 'to_velar'}", "--adapter", f"code={ADAPTERS / 'code'}",
    )  # fmt: skip
    assert report["summary"][0]["faults"] == ["swapped"]
    assert "task swapped" in refusal(tmp_path, record_of(report, "swapped"))


def test_a_known_score_that_is_missed_is_a_fault(tmp_path: Path) -> None:
    text = (ROOT / "eval/tasks/to_velar.toml").read_text()
    (tmp_path / "easy.toml").write_text("expected = 10.0\n" + text)
    (tmp_path / "hard.toml").write_text("expected = 100.1\n" + text)
    report = evaluate(
        tmp_path, "--tasks", f"{tmp_path / 'easy.toml'}:a,{tmp_path / 'hard.toml'}:a", "--adapter",
        f"a={ADAPTERS / 'to_velar'}", "--variants", "fp16",
    )  # fmt: skip
    assert report["summary"][0]["faults"] == ["hard"]
    assert "where 100.1 is expected" in record_of(report, "hard")["faults"][0]


def test_identities_are_the_servers(tmp_path: Path) -> None:
    report = evaluate(tmp_path, "--tasks", "to_velar,safety", "--variants", "fp16", "--examples", "1")
    for name in ("to_velar", "safety"):
        read = read_adapter(ADAPTERS / name, read_spec(BASE), torch.float32)
        assert record_of(report, name)["adapter_identity"] == read.identity


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--tasks", "nothing"], "no task 'nothing'"),
        (["--tasks", "maths,maths"], "named twice"),
        (["--variants", "fp17"], "no variant 'fp17'; known: fp16, rtn"),
        (["--variants", "x=/nowhere"], "/nowhere/config.json does not exist"),
        (["--bits", "four"], "whole numbers"),
        (["--bits", "5", "--variants", "rtn"], "5 bits: only"),
        (["--adapter", "maths"], "write NAME=PATH"),
        (["--adapter", "maths=/nowhere"], "has no adapter_config.json"),
        (["--adapter", "a=b"], "has no adapter of its name; write maths:none, or maths: and one of a"),
        (["--backend", "server"], "needs --url"),
        (["--backend", "server", "--url", "http://127.0.0.1:9"], "does not answer"),
        (["--base", "/nowhere"], "--base /nowhere: /nowhere holds no model"),
        (["--backend", "blocks"], "--backend blocks decodes nothing: give --forward-only"),
        (["--bits", "99", "--variants", "rtn"], "99 bits: only"),
        (["--out", "/dev/null/x/report"], "/dev/null/x: Not a directory; what is in"),
    ],
)
def test_a_wrong_command_is_one_clear_line(
    tmp_path: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [
        "--tasks",
        "maths",
        "--variants",
        "fp16",
        "--cache",
        str(tmp_path),
        "--out",
        str(tmp_path / "r"),
        "--workers",
        "0",
    ]
    assert run.main([*common, *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("eval: ")
    assert reason in said


def test_a_full_disk_is_one_clear_line_and_keeps_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, report: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = ["--tasks", "code", "--variants", "fp16", "--examples", "2", "--workers", "0", "--no-figures"]
    arguments += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "report")]
    with monkeypatch.context() as patch:
        patch.setattr("eval.report.write_json", full)
        assert run.main(arguments) == 2
    assert "eval: No space left on device; what is in" in capsys.readouterr().err
    kept = sorted((tmp_path / "cache" / "answers").iterdir())
    assert len(kept) == 2  # with the adapter and without
    assert run.main(arguments) == 0
    assert sorted((tmp_path / "cache" / "answers").iterdir()) == kept


def test_examples_are_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--examples", "-1"])
    assert "'-1' is not a number of 0 or more" in capsys.readouterr().err


def test_a_subset_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    """A worker, quantizing, figures, and the oracle beside the engine: all answers the same."""
    if not long and not torch.cuda.is_available():  # a worker that is forked imports nothing
        forks = multiprocessing.get_context("fork")
        monkeypatch.setattr(run, "multiprocessing", SimpleNamespace(get_context=lambda method: forks))
    arguments = ["--tasks", "to_velar", "--variants", "fp16,rtn", "--bits", "4", "--examples", "3",
                 "--calibration-tokens", "600", "--compare", "oracle"]  # fmt: skip
    assert run.main([*arguments, "--out", str(tmp_path / "report"), "--cache", str(tmp_path / "cache")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["variant"] for row in report["summary"]] == ["fp16", "rtn"]
    assert [row["different_answers"] for row in report["differences"]] == [0] * 3
    assert sum(row["examples"] for row in report["differences"]) == 9
    assert (tmp_path / "report-heat-map.png").exists()


def test_the_script_runs_what_it_is_told(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    command = ["bash", str(ROOT / "eval/run_all.sh"), "--tasks", "a b"]
    environment = {**os.environ, "INLAID_PYTHON": str(python)}
    said = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    assert said[0].split(":")[0] == str(ROOT)
    assert said[1:] == ["-m", "eval.run", "--tasks", "a b"]
