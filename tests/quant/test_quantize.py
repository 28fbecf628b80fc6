"""The whole rail on tiny models: incremental equals full, kills, refusals, and files that say what was solved."""

from __future__ import annotations

import errno
import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from inlaid.adapters.adapter import AdapterError
from inlaid.checkpoint import Checkpoint, CheckpointError, dequantize
from inlaid.model.weights import fuse
from inlaid.quant import loop, plan, publish
from inlaid.quant import quantize as rail
from inlaid.quant.bank import bank_path
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.examples import CalibrationError
from inlaid.quant.grid import Grid
from inlaid.quant.quantize import add_task, quantize, remove_task
from inlaid.quant.record import Record
from inlaid.quant.settings import Gate, Place, QuantizeError, Settings, TaskSource
from tests.quant import killed
from tests.quant.tiny import FAMILIES, write_adapter, write_base, write_data

ANYWAY = Gate(force=True)  # random models fit nothing; the gate has tests of its own
SETTINGS = Settings(Grid(4, 32), CalibrationSettings(held_out=0.25), "mean")


@dataclass(frozen=True)
class World:
    """A base and four tasks."""

    base: Path
    tasks: dict[str, TaskSource]

    def pick(self, *names: str) -> list[TaskSource]:
        return [self.tasks[name] for name in names]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    base = write_base(root / "base")
    tasks = {}
    for i, name in enumerate("abcd"):
        adapter = write_adapter(root / name, base, i, ("q_proj", "down_proj") if i % 2 else ("v_proj", "up_proj"))
        tasks[name] = TaskSource(name, adapter, write_data(root / f"{name}.jsonl", i))
    return World(base, tasks)


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("aggregation", ["mean", pytest.param("minimax-loss", marks=pytest.mark.long)])
def test_incremental_equals_full_bit_for_bit(tmp_path: Path, world: World, aggregation: str) -> None:
    settings = replace(SETTINGS, aggregation=aggregation)
    quantize(world.base, world.pick("a", "b", "c"), settings, tmp_path / "full", gate=ANYWAY)
    full = weights(tmp_path / "full")
    assert len(full) == 4  # three blocks and the rest

    quantize(world.base, world.pick("c", "a"), settings, tmp_path / "added", gate=ANYWAY)
    assert weights(tmp_path / "added") != full
    add_task(tmp_path / "added", world.tasks["b"], gate=ANYWAY)
    assert weights(tmp_path / "added") == full

    quantize(world.base, world.pick("d", "b"), settings, tmp_path / "other", gate=ANYWAY)
    add_task(tmp_path / "other", world.tasks["c"], gate=ANYWAY)
    add_task(tmp_path / "other", world.tasks["a"], gate=ANYWAY)
    remove_task(tmp_path / "other", "d", gate=ANYWAY)
    assert weights(tmp_path / "other") == full
    assert sorted(Record.read(tmp_path / "other").tasks) == ["a", "b", "c"]


def test_adding_runs_only_the_new_task(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(world.base, world.pick("a", "b"), SETTINGS, tmp_path / "out", gate=ANYWAY)
    calls = []
    real = loop.block_hessians
    monkeypatch.setattr(loop, "block_hessians", lambda *args, **more: calls.append(args[3]) or real(*args, **more))
    add_task(tmp_path / "out", world.tasks["c"], gate=ANYWAY)
    assert len(calls) == 3  # one for each block
    assert len({adapter.identity for adapter in calls}) == 1
    remove_task(tmp_path / "out", "a", gate=ANYWAY)
    assert len(calls) == 3
    assert len(list(bank_path(tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_holds_what_was_solved(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family; the packed file, opened as a model by blocks, computes what transformers computes with the
    dequantized weights put in place."""
    # A family's own tokenizer class would not read the words.
    monkeypatch.setattr(plan, "read_tokenizer", PreTrainedTokenizerFast.from_pretrained)
    base = write_base(tmp_path / "base", family)
    source = TaskSource("t", Path("none"), write_data(tmp_path / "t.jsonl", 0))
    grid = Grid(3, 32, act_order=True)
    record = quantize(base, [source], Settings(grid, aggregation="mean"), tmp_path / "out", gate=ANYWAY)
    checkpoint = Checkpoint(tmp_path / "out")
    assert len(checkpoint.linears) == 21
    assert checkpoint.linear(checkpoint.linears[0]).spec.act_order
    whole = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        for name in checkpoint.linears:
            whole.get_submodule(name).weight.copy_(dequantize(checkpoint.linear(name)).T)
    planned = plan.Plan(base, [source], Settings(grid, aggregation="mean"), Place())
    total = count = 0.0
    for sequence in planned.tasks[0].calibration.held_out:
        ids = torch.tensor([sequence.ids])
        with torch.no_grad():
            logits = whole(input_ids=ids).logits[0, :-1].double()
        first = max(sequence.answer, 1)
        picked = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[first - 1 :]
        total, count = total - float(picked.sum()), count + len(picked)
    assert record.tasks["t"]["loss_quantized"] == pytest.approx(total / count, rel=1e-4)


def test_what_other_readers_find(tmp_path: Path, world: World) -> None:
    quantize(world.base, world.pick("a"), SETTINGS, tmp_path / "out", gate=ANYWAY)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"] == json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert {name.rsplit(".", 1)[1] for name in index if "q_proj" in name} == {"qweight", "qzeros", "scales", "g_idx"}
    assert (tmp_path / "out/tokenizer.json").exists()
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("aggregation", ["mean", pytest.param("minimax-loss", marks=pytest.mark.long)])
def test_sequential_mode(tmp_path: Path, world: World, aggregation: str) -> None:
    settings = replace(SETTINGS, grid=Grid(2, 32), sequential=True, aggregation=aggregation)
    quantize(world.base, world.pick("a", "b"), settings, tmp_path / "one", gate=ANYWAY)
    quantize(world.base, world.pick("a", "b"), replace(settings, sequential=False), tmp_path / "two", gate=ANYWAY)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    if aggregation == "mean":  # else the losses of later blocks weigh on it
        assert one["model-block-000.safetensors"] == two["model-block-000.safetensors"]  # nothing quantized before it
    assert one["model-block-001.safetensors"] != two["model-block-001.safetensors"]
    assert not bank_path(tmp_path / "one").exists()
    quantize(world.base, world.pick("b"), settings, tmp_path / "three", gate=ANYWAY)
    add_task(tmp_path / "three", world.tasks["a"], gate=ANYWAY)
    assert weights(tmp_path / "three") == one


def test_siblings_share_an_input_order(tmp_path: Path, world: World) -> None:
    """Or serving could not fuse them: q, k and v read one tensor, and one permutation of it."""
    quantize(
        world.base, world.pick("a", "b"), replace(SETTINGS, grid=Grid.of_width(3, 32)), tmp_path / "out", gate=ANYWAY
    )
    checkpoint = Checkpoint(tmp_path / "out")
    for block in range(3):
        for siblings in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ):
            fused = fuse([checkpoint.linear(f"model.layers.{block}.{name}") for name in siblings])
            assert fused is not None
            assert fused.spec.act_order


@pytest.mark.parametrize(
    ("sequential", "aggregation", "at"),
    [
        (False, "mean", "layer 1, task b"),
        pytest.param(True, "mean", "layer 2, task a", marks=pytest.mark.long),
        (False, "minimax-loss", "layer 1 solved, 15"),
    ],
)
def test_a_killed_run_leaves_the_old_and_resumes(
    tmp_path: Path, world: World, sequential: bool, aggregation: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rail, "ENOUGH", -1.0)
    monkeypatch.setattr(rail, "LOSS_ROUNDS", 3)
    settings = replace(SETTINGS, sequential=sequential, aggregation=aggregation)
    expected = tmp_path / "expected"
    quantize(world.base, world.pick("a", "b"), settings, expected, gate=ANYWAY)
    out = tmp_path / "out"
    quantize(world.base, world.pick("c"), SETTINGS, out, gate=ANYWAY)
    old = weights(out)
    tasks = [f"{task.name}={task.adapter}:{task.data}" for task in world.pick("a", "b")]
    written = json.dumps(Record(out, {}, settings, {}, []).values()["settings"])
    assert killed.exit_code(killed.quantize_until, world.base, out, at, written, tasks) == -signal.SIGKILL
    assert weights(out) == old
    assert "c" in Record.read(out).tasks

    made = []
    real = loop.block_hessians
    monkeypatch.setattr(loop, "block_hessians", lambda *args, **more: made.append(args[2]) or real(*args, **more))
    quantize(world.base, world.pick("a", "b"), settings, out, gate=ANYWAY)
    assert weights(out) == weights(expected)
    assert len(made) < 6  # three blocks of two tasks, less what the killed run had done
    assert not list(tmp_path.glob(".out.*"))


def test_minimax_loss_solves_again_only_while_a_task_has_lost_much(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fills: list[loop.Weights] = []
    real = loop.BlockLoop.fill
    monkeypatch.setattr(loop.BlockLoop, "fill", lambda self, to, each: fills.append(each) or real(self, to, each))
    settings = replace(SETTINGS, aggregation="minimax-loss")
    monkeypatch.setattr(rail, "ENOUGH", 1e9)
    quantize(world.base, world.pick("a", "b"), settings, tmp_path / "out", gate=ANYWAY)
    assert [(each.shares_T.tolist(), each.by_trace) for each in fills] == [([0.5, 0.5], False)], "the plain mean"
    assert not Record.read(tmp_path / "out").by_trace
    fills.clear()
    monkeypatch.setattr(rail, "ENOUGH", -1.0)
    monkeypatch.setattr(rail, "PATIENCE", 1)
    monkeypatch.setattr(rail, "LOSS_ROUNDS", 4)
    record = quantize(world.base, world.pick("a", "b"), settings, tmp_path / "out", gate=ANYWAY)
    assert [each.by_trace for each in fills[:2]] == [False, True], "both means come first"
    assert len(fills) in (3, 4), "a third round follows, and a fourth if that is better"
    assert len({each.by_trace for each in fills[2:]}) == 1, "those with raised weights go on from the better mean"
    assert any(record.shares == dict(zip("ab", each.shares_T.tolist(), strict=True)) for each in fills)


@pytest.mark.parametrize("writer", ["write_atomically", "write_tensors"])
def test_a_full_disk_leaves_the_old(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    out = tmp_path / "out"
    quantize(world.base, world.pick("a"), SETTINGS, out, gate=ANYWAY)
    old = weights(out)

    def full(path: Path, *data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(loop, writer, full)
    with pytest.raises(OSError, match="No space"):
        add_task(out, world.tasks["b"], gate=ANYWAY)
    assert weights(out) == old
    assert sorted(Record.read(out).tasks) == ["a"]


def test_what_a_killed_job_had_half_written_goes(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill leaves the file that was being written under its temporary name, in the folder and in the bank."""
    out, real = tmp_path / "out", loop.write_tensors

    def killed(path: Path, *data: Any) -> None:
        if path.name == "model-block-001.safetensors":
            for folder in (path.parent, *bank_path(out).iterdir()):
                (folder / f".{path.name}.123.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        real(path, *data)

    monkeypatch.setattr(loop, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(world.base, world.pick("a"), SETTINGS, out, gate=ANYWAY)
    assert len(list(tmp_path.rglob("*.tmp"))) == 2
    monkeypatch.setattr(loop, "write_tensors", real)
    quantize(world.base, world.pick("a"), SETTINGS, out, gate=ANYWAY)
    assert not list(tmp_path.rglob("*.tmp"))


def test_only_one_job_at_a_time(tmp_path: Path, world: World) -> None:
    out = tmp_path / "out"
    with publish.only_job(out), pytest.raises(QuantizeError, match="another job"):
        quantize(world.base, world.pick("a"), SETTINGS, out)


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path, world: World) -> None:
    out, a = tmp_path / "out", world.tasks["a"]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    other = write_base(tmp_path / "other", "llama", seed=9)
    wrong = write_adapter(tmp_path / "wrong", other, 0, ("lm_head",))
    cases = [
        ([], SETTINGS, QuantizeError, "at least one task"),
        ([a, a], SETTINGS, QuantizeError, "same name"),
        ([replace(a, data=empty)], SETTINGS, CalibrationError, "no examples"),
        ([replace(a, data=tmp_path / "gone")], SETTINGS, CalibrationError, "cannot be read"),
        ([replace(a, adapter=tmp_path / "gone")], SETTINGS, AdapterError, "not a PEFT adapter"),
        ([replace(a, adapter=wrong)], SETTINGS, AdapterError, "lm_head"),
        ([a], replace(SETTINGS, grid=Grid(4, 48)), QuantizeError, "groups of 48"),
        ([a], replace(SETTINGS, grid=Grid(4, 64)), QuantizeError, "down_proj"),
    ]
    for sources, settings, error, words in cases:
        with pytest.raises(error, match=words):
            quantize(world.base, sources, settings, out)
    with pytest.raises(CheckpointError, match="does not exist"):
        quantize(tmp_path / "nowhere", [a], SETTINGS, out)
    with pytest.raises(QuantizeError, match="base itself"):
        quantize(world.base, [a], SETTINGS, world.base)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    for bad in ({"aggregation": "median"}, {"dtype": "int3"}, {"bank_precision": "int8"}):
        with pytest.raises(QuantizeError):
            replace(SETTINGS, **bad)
    for text in ("name", "name=only", "na me=a:b"):
        with pytest.raises(QuantizeError, match="NAME=ADAPTER:DATA"):
            TaskSource.parse(text)


def test_bases_adapters_and_data_are_never_mixed(tmp_path: Path, world: World) -> None:
    base = write_base(tmp_path / "base", seed=1)
    adapter = write_adapter(tmp_path / "adapter", base, 1)
    source = TaskSource("t", adapter, write_data(tmp_path / "t.jsonl", 1))
    out = tmp_path / "out"
    quantize(base, [source], SETTINGS, out, gate=ANYWAY)
    with pytest.raises(QuantizeError, match="already has a task t"):
        add_task(out, source)
    with pytest.raises(QuantizeError, match="has no task x"):
        remove_task(out, "x")
    with pytest.raises(QuantizeError, match="only task"):
        remove_task(out, "t")
    with pytest.raises(QuantizeError, match="quantized already"):
        quantize(out, [source], SETTINGS, tmp_path / "again")
    with pytest.raises(QuantizeError, match=r"no inlaid\.json"):
        add_task(base, source)
    new = replace(source, name="u")
    write_data(tmp_path / "t.jsonl", 2)
    with pytest.raises(QuantizeError, match="data of task t has changed"):
        add_task(out, new)
    write_data(tmp_path / "t.jsonl", 1)
    write_adapter(adapter, base, 5)
    with pytest.raises(QuantizeError, match="adapter of task t has changed"):
        add_task(out, new)
    write_adapter(adapter, base, 1)
    write_base(base, seed=2)
    with pytest.raises(QuantizeError, match="not the base"):
        add_task(out, new)
