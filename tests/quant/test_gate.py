"""The gate: its rules one by one, and the demo's own tasks with poison in them."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inlaid.adapters.gate import GateError
from inlaid.checkpoint import Checkpoint
from inlaid.quant import gate
from inlaid.quant import quantize as rail
from inlaid.quant.blocks import BlockModel, Stream
from inlaid.quant.calibration import Batch, CalibrationSettings, Sequence
from inlaid.quant.gate import Fit, GateTask, mispaired, regressions, why_unfit
from inlaid.quant.grid import Grid
from inlaid.quant.losses import Loss
from inlaid.quant.quantize import add_task, quantize
from inlaid.quant.record import Record
from inlaid.quant.settings import Gate, Settings, TaskSource

DEMO = Path("models/demo")
GOOD = Fit(full=0.1, alone=2.0, mispaired=3.0, loudness=1.2)
SETTINGS = Settings(Grid(4, 128), CalibrationSettings(max_tokens=1500), "mean")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"mispaired": None}, None),
        ({"full": 2.005, "mispaired": None}, None),
        ({"full": float("nan")}, "not finite"),
        ({"loudness": 1000.0}, "1e+03 times as loud"),
        ({"full": 5.0, "alone": 9.0, "mispaired": None}, "blind guess"),
        ({"full": 2.5, "mispaired": 9.0}, "than without"),
        ({"full": 1.9, "mispaired": 2.0}, "wrong prompts"),
    ],
)
def test_what_makes_a_task_unfit(change: dict, words: str | None) -> None:
    reason = why_unfit(replace(GOOD, **change), vocabulary=100)
    if words is None:
        assert reason is None
    else:
        assert words in (reason or "")


def test_tasks_are_checked_so_many_at_a_time_and_each_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BlockModel(Checkpoint(DEMO / "base"))
    sequences = [Sequence(tuple(range(5 + n, 25 + 2 * n)), 4) for n in range(6)]
    tasks = [GateTask(str(n), None, (sequence, sequence)) for n, sequence in enumerate(sequences)]
    held: list[int] = []
    start, finish = model.start, gate._Pass.finish

    def counted(parts: list[Batch]) -> list[Stream]:
        held.append(sum(part.ids_BS.numel() for part in parts))
        return start(parts)

    def ended(done: gate._Pass) -> None:
        held.append(-sum(stream.batch.ids_BS.numel() for stream in done.streams))
        finish(done)

    monkeypatch.setattr(model, "start", counted)
    monkeypatch.setattr(gate._Pass, "finish", ended)
    together = gate.quantized_losses(model, tasks, lambda what: None)
    assert max(accumulate(held)) == sum(2 * len(sequence.ids) for sequence in sequences)
    held.clear()
    monkeypatch.setattr(gate, "HELD", 100)
    assert gate.quantized_losses(model, tasks, lambda what: None) == together
    assert max(accumulate(held)) <= 100
    assert sum(held) == 0


def test_answers_are_exchanged_not_prompts() -> None:
    one, two = Sequence((1, 2, 8), 2), Sequence((3, 4, 5, 9, 9), 3)
    assert mispaired((one, two)) == (Sequence((1, 2, 9, 9), 2), Sequence((3, 4, 5, 8), 3))
    assert mispaired((one, one)) == ()
    assert mispaired((Sequence((1, 2), 0), Sequence((3,), 0))) == ()


def loss(*nats: float) -> Loss:
    return Loss(nats, (1,) * len(nats))


def test_regressions_are_beyond_the_tolerance_or_not_numbers() -> None:
    before = {name: loss(1.0) for name in "abc"}
    after = {"a": loss(1.01), "b": loss(1.5), "c": loss(float("nan")), "new": loss(9.0)}
    assert regressions(before, after, 0.02) == [
        "b: 1.0000 -> 1.5000 nats a token (more by at most 0.0200 is allowed)",
        "c: 1.0000 -> nan nats a token (more by at most 0.0200 is allowed)",
    ]


def test_a_tolerance_is_a_share_of_a_large_loss_and_knows_how_certain_the_difference_is() -> None:
    assert regressions({"a": loss(3.0)}, {"a": loss(3.05)}, 0.02) == []
    assert len(regressions({"a": loss(3.0)}, {"a": loss(3.07)}, 0.02)) == 1
    before = loss(1.0, 2.0, 3.0, 4.0)
    assert len(regressions({"a": before}, {"a": loss(1.2, 2.2, 3.2, 4.2)}, 0.02)) == 1, "worse on each example alike"
    assert regressions({"a": before}, {"a": loss(2.3, 1.5, 3.5, 3.5)}, 0.02) == [], "as much on average, by chance"
    assert loss(1.0, 2.0, 3.0).error == pytest.approx(1 / 3**0.5)
    assert before.error_beside(loss(1.0)) == 0


def test_a_task_is_not_refused_by_less_than_its_examples_can_tell() -> None:
    close = replace(GOOD, full=2.6281, mispaired=2.92, alone=2.7)
    assert "wrong prompts" in (why_unfit(close, vocabulary=100) or "")
    assert why_unfit(replace(close, mispaired_error=0.01), vocabulary=100) is None
    assert "than without" in (why_unfit(replace(close, alone=2.6, mispaired=None), vocabulary=100) or "")
    assert why_unfit(replace(close, alone=2.6, alone_error=0.01, mispaired=None), vocabulary=100) is None


def source(name: str, folder: Path, examples: int = 24) -> TaskSource:
    lines = Path(f"data/{name}/calibration.jsonl").read_text().splitlines()[:examples]
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(lines))
    return TaskSource(name, DEMO / "adapters" / name, file)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantize the demo's base for one of its tasks, which the gate lets pass."""
    folder = tmp_path_factory.mktemp("demo")
    quantize(DEMO / "base", [source("maths", folder)], SETTINGS, folder / "out")
    return folder


def poisoned(folder: Path, kind: str) -> TaskSource:
    clean = source("safety", folder)
    lines = [json.loads(line) for line in clean.data.read_text().splitlines()]
    draw = random.Random(0)
    if kind == "random labels":
        answers = [line["completion"] for line in lines]
        draw.shuffle(answers)
        lines = [line | {"completion": answer} for line, answer in zip(lines, answers)]
    if kind == "garbage text":
        garbage = ["".join(chr(draw.randint(33, 126)) for _ in range(40)) for _ in lines]
        lines = [line | {"completion": text} for line, text in zip(lines, garbage)]
    data = folder / f"{kind}.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    if kind != "huge activations":
        return replace(clean, data=data)
    adapter = folder / "huge"
    shutil.copytree(clean.adapter, adapter, dirs_exist_ok=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: tensor * 300 if "lora_B" in name else tensor for name, tensor in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    return TaskSource("safety", adapter, data)


@pytest.mark.parametrize("kind", ["random labels", "garbage text", "huge activations"])
def test_poison_is_refused_and_nothing_changes(quantized: Path, kind: str) -> None:
    out = quantized / "out"
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(GateError, match="refused before quantizing: safety: "):
        add_task(out, poisoned(quantized, kind))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.long
def test_a_task_that_hurts_the_old_is_refused_with_the_numbers_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Huge activations that slip past the first check: the second one sees what they do to the others."""
    out, coarse = tmp_path / "out", replace(SETTINGS, grid=Grid(2, 32))
    old = quantize(DEMO / "base", [source("maths", tmp_path)], coarse, out).tasks["maths"]["loss_quantized"]
    monkeypatch.setattr(rail, "why_unfit", lambda fit, vocabulary: None)
    huge = poisoned(tmp_path, "huge activations")
    with pytest.raises(GateError, match=rf"maths: {old:.4f} -> \d+\.\d+ nats a token"):
        add_task(out, huge)
    assert sorted(Record.read(out).tasks) == ["maths"]
    forced = add_task(out, huge, gate=Gate(force=True))
    assert forced.tasks["maths"]["loss_quantized"] > old + 0.02


def test_a_good_task_passes_and_is_recorded(quantized: Path) -> None:
    record = add_task(quantized / "out", source("safety", quantized))
    for task in record.tasks.values():
        assert torch.isfinite(torch.tensor(task["loss_quantized"]))
        assert task["loss_full"] <= task["loss_quantized"] + 0.01
        assert len(task["adapter_hash"]) == len(task["data_hash"]) == 64
