"""The command line: the same job through flags, a table that names every task, one sentence for every mistake."""

from __future__ import annotations

import argparse
import errno
import json
from pathlib import Path
from typing import Any

import pytest

from inlaid.model.spec import ModelSpec, spec_from_config
from inlaid.quant import command, loop
from inlaid.quant.grid import SolverError, choose_group_size
from inlaid.quant.record import Record
from tests.quant.tiny import write_adapter, write_base, write_data


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="command")
    command.add_quantize_arguments(verbs.add_parser("quantize"))
    command.add_task_arguments(verbs.add_parser("task"))
    args = parser.parse_args(words)
    return command.run_quantize(args) if args.command == "quantize" else command.run_task(args)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    base = write_base(tmp_path / "base")
    for i, name in enumerate("ab"):
        write_adapter(tmp_path / name, base, i)
        write_data(tmp_path / f"{name}.jsonl", i)
    return tmp_path


def task(world: Path, name: str) -> str:
    return f"{name}={world / name}:{world / name}.jsonl"


def test_quantize_add_list_remove(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, common = str(world / "out"), ("--device", "cpu", "--force")
    made = run("quantize", str(world / "base"), "--out", out, "--bits", "3", "--group-size", "32", "--act-order",
               "--aggregation", "mean", "--task", task(world, "a"), *common)  # fmt: skip
    assert made == 0
    grid = Record.read(world / "out").settings.grid
    assert (grid.bits, grid.group_size, grid.act_order) == (3, 32, True)
    assert run("task", "add", out, task(world, "b"), *common) == 0
    capsys.readouterr()
    assert run("task", "list", out) == 0
    shown = capsys.readouterr().out
    assert "3 bits, groups of 32, mean, independent" in shown
    *tasks, seconds = shown.splitlines()[2:]
    assert [line.split()[0] for line in tasks] == ["a", "b"]
    assert seconds.startswith("the last job took ")
    assert all(part in seconds for part in ("forward ", "Hessians ", "solving ", "bank ", "checking "))
    assert run("task", "remove", out, "a", *common) == 0
    capsys.readouterr()
    assert run("task", "list", out, "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["tasks"]) == ["b"]


@pytest.fixture
def _no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bars print, as a command does; pytest's own handlers would take their lines for a log's."""
    monkeypatch.setattr("inlaid.progress.log.hasHandlers", lambda: False)


@pytest.mark.usefixtures("_no_log")
def test_progress_says_layer_task_and_time_left(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("quantize", str(world / "base"), "--out", str(world / "out"), "--group-size", "32", "--device", "cpu",
        "--force", "--task", task(world, "a"))  # fmt: skip
    bar = capsys.readouterr().err
    assert "layer 1, task a" in bar
    assert " left" in bar


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--task", "nonsense"), "is not NAME=ADAPTER:DATA"),
        ((), "give at least one task"),
        (("--task", "a=gone:gone.jsonl"), "not a PEFT adapter"),
        (("--task", "a=none:gone.jsonl"), "cannot be read"),
        (("--group-size", "48", "--task", "a=none:gone.jsonl"), "groups of 48"),
        (("--task", "a=none:gone.jsonl", "--device", "cuda:77"), "--device cuda:77: there are"),
        (("--task", "a=none:gone.jsonl", "--device", "tpu"), "give auto, cpu, cuda or cuda:N"),
        (("--task", "a=none:gone.jsonl", "--held-out", "2"), "held_out"),
    ],
)
def test_mistakes_are_one_sentence(
    world: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], sentence: str
) -> None:
    device = () if "--device" in words else ("--device", "cpu")
    assert run("quantize", str(world / "base"), "--out", str(world / "out"), "--group-size", "32", *device, *words) == 2
    (said,) = capsys.readouterr().err.splitlines()  # and no bar before it
    assert said.startswith("inlaid: ")
    assert sentence in said
    assert not (world / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("list", "none/there"), "only folders made by `inlaid quantize` have tasks"),
        (("remove", "none/there", "a"), "only folders made by `inlaid quantize` have tasks"),
        (("add", "none/there", "a=none:gone.jsonl"), "only folders made by `inlaid quantize` have tasks"),
        (("add", "none/there", "nonsense"), "is not NAME=ADAPTER:DATA"),
    ],
)
def test_mistakes_with_tasks_are_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...],
    sentence: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run("task", *words) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("inlaid: ")
    assert sentence in said
    assert not any(tmp_path.iterdir())


def test_what_the_gate_refuses_is_no_mistake(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("quantize", str(world / "base"), "--out", str(world / "out"), "--group-size", "32", "--device", "cpu")
    assert run(*words, "--task", task(world, "a")) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("inlaid: refused before quantizing")


def test_a_full_disk_is_told_and_can_go_on(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("quantize", str(world / "base"), "--out", str(world / "out"), "--group-size", "32", "--device", "cpu",
             "--force", "--task", task(world, "a"))  # fmt: skip
    real, written = loop.write_tensors, []

    def nearly_full(path: Path, *data: Any) -> None:
        written.append(path)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, *data)

    monkeypatch.setattr(loop, "write_tensors", nearly_full)
    assert run(*words) == 1
    assert "free some space and run the same command" in capsys.readouterr().err.splitlines()[-1]
    assert not (world / "out").exists()
    monkeypatch.setattr(loop, "write_tensors", real)
    assert run(*words) == 0


@pytest.mark.parametrize(
    ("hidden", "mlp", "size", "told"),
    [
        (1024, 2816, 128, []),
        (576, 1536, 64, ["groups of 64: 128 does not divide 576 inputs of this base's linears"]),
        (1024, 96, 32, ["groups of 32: 64 does not divide 96 inputs of this base's linears"]),
    ],
)
def test_the_group_size_is_the_largest_that_divides_and_told(hidden: int, mlp: int, size: int, told: list[str]) -> None:
    heard: list[str] = []
    assert choose_group_size(spec_of(hidden, mlp), heard.append) == size
    assert heard == told


def test_a_base_that_no_group_size_divides_is_refused_with_the_flag() -> None:
    with pytest.raises(SolverError, match=r"divides this base's inputs \(48, 1024\); give --group-size"):
        choose_group_size(spec_of(1024, 48), print)


def spec_of(hidden: int, mlp: int) -> ModelSpec:
    config = {"model_type": "llama", "vocab_size": 9, "hidden_size": hidden, "intermediate_size": mlp}
    return spec_from_config({**config, "num_hidden_layers": 1, "num_attention_heads": hidden // 32, "head_dim": 32})
