"""train_lora on a tiny random base: adapters that peft and inlaid read, the same alone as side by side, and after a
kill."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from inlaid.adapters.peft import read_adapter
from inlaid.model.spec import read_spec
from models import train_lora
from models.train_lora import TrainSettings, answer_tokens, read_tasks
from tests.quant.tiny import write_base

STEPS = 24
FLAGS = [
    "--steps",
    str(STEPS),
    "--batch",
    "4",
    "--rank",
    "4",
    "--rate",
    "0.01",
    "--max-length",
    "32",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("train") / "base")


@pytest.fixture(scope="module")
def data(base: Path) -> dict[str, Path]:
    """Two tasks of words: say the first word again, and say one word always; the second as conversations would be."""
    made = {}
    for name in ("first", "always"):
        rng, lines = random.Random(name), []
        for _ in range(40):
            words = [f"w{rng.randrange(4, 96)}" for _ in range(rng.randrange(2, 6))]
            lines.append(json.dumps({"prompt": " ".join(words), "completion": words[0] if name == "first" else "w50"}))
        made[name] = base.parent / f"{name}.jsonl"
        made[name].write_text("\n".join(lines) + "\n")
    return made


def run(base: Path, data: dict[str, Path], out: Path, *names: str, **flags: Any) -> int:
    given = [text for name in names for text in ("--task", f"{name}={data[name]}")]
    more = [text for flag, value in flags.items() for text in (f"--{flag.replace('_', '-')}", str(value))]
    return train_lora.main([str(base), *given, "--out", str(out), *FLAGS, *more])


def about(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / name / "training.json").read_text())
    return found


@pytest.fixture(scope="module")
def both(base: Path, data: dict[str, Path]) -> Path:
    out = base.parent / "both"
    assert run(base, data, out, "first", "always") == 0
    return out


def test_what_is_trained_is_an_adapter_for_inlaid_and_for_peft(base: Path, data: dict[str, Path], both: Path) -> None:
    assert sorted(each.name for each in both.iterdir()) == ["always", "first"], "no state is left"
    settings = TrainSettings(rank=4, steps=STEPS, batch=4, rate=0.01, max_length=32)
    for task in read_tasks(base, [f"{name}={file}" for name, file in data.items()], settings):
        found = about(both, task.name)
        assert (both / task.name / "loss.png").stat().st_size > 0
        assert len(found["losses"]) == STEPS
        assert sum(found["losses"][-4:]) < sum(found["losses"][:4])
        assert found["adapter"]["loss"] < found["base"]["loss"]
        adapter = read_adapter(both / task.name, read_spec(base), torch.float32)
        assert {entry.rank for entry in adapter.entries} == {4}
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), both / task.name).eval()
        batch = train_lora.padded(list(task.held_out))
        with torch.no_grad():
            nll_N, _, _ = answer_tokens(model.get_base_model(), batch.ids_BS, batch.answer_BS)
        assert float(nll_N.mean()) == pytest.approx(found["adapter"]["loss"], abs=0.01)  # factors are kept in fp16
    assert about(both, "always")["adapter"]["exact"] == 1.0
    assert about(both, "always")["base"]["exact"] == 0.0


def test_an_adapter_does_not_depend_on_its_neighbours(
    base: Path, data: dict[str, Path], both: Path, tmp_path: Path
) -> None:
    assert run(base, data, tmp_path, "first") == 0
    assert about(tmp_path, "first")["losses"] == pytest.approx(about(both, "first")["losses"], abs=0.02)


def test_a_killed_run_goes_on_to_the_same_losses(
    base: Path, data: dict[str, Path], both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_lora, "_KEEP_EVERY", 5)
    left, clip_each = 13, train_lora.clip_each

    def killed(trained: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        clip_each(trained)

    monkeypatch.setattr(train_lora, "clip_each", killed)
    with pytest.raises(KeyboardInterrupt):
        run(base, data, tmp_path, "first", "always")
    [state] = tmp_path.iterdir()
    left = STEPS - 10
    assert run(base, data, tmp_path, "first", "always") == 0, "it went on from step 10"
    assert left == 0
    assert not state.exists()
    for name in data:
        assert about(tmp_path, name)["losses"] == about(both, name)["losses"]
        assert about(tmp_path, name)["adapter"] == about(both, name)["adapter"]


def test_what_is_trained_already_is_left_and_what_changed_is_not(
    base: Path, data: dict[str, Path], both: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def train_group(base: Path, tasks: Any, *rest: object) -> list[Any]:
        started.extend(task.name for task in tasks)
        return []

    monkeypatch.setattr(train_lora, "train_group", train_group)
    assert run(base, data, both, "first", "always") == 0
    assert started == []
    assert capsys.readouterr().out.count("trained before, with the same data and settings") == 2
    assert run(base, data, both, "first", "always", seed=1) == 0
    assert started == ["first", "always"]


def test_a_step_needs_no_past(base: Path, data: dict[str, Path]) -> None:
    settings = TrainSettings(batch=4, max_length=32)
    [task] = read_tasks(base, [f"first={data['first']}"], settings)
    epoch = [row for step in range(9) for row in task.rows(step, settings)]
    assert sorted(row.ids for row in epoch) == sorted(row.ids for row in task.fitting), "36 examples, each once"
    assert task.rows(9, settings) != task.rows(0, settings)
    assert not {row.ids for row in task.held_out} - {row.ids for row in task.held_out if row not in task.fitting}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("nothing", "write NAME=FILE.jsonl"),
        ("../a=x", "write NAME=FILE.jsonl"),
        ("a=no.jsonl", "no.jsonl cannot be read"),
    ],
)
def test_errors_are_one_sentence(base: Path, tmp_path: Path, task: str, said: str, capsys: Any) -> None:
    assert train_lora.main([str(base), "--task", task, "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err
    assert "\n" not in err


def test_a_conversation_needs_a_template(base: Path, tmp_path: Path, capsys: Any) -> None:
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert train_lora.main([str(base), "--task", f"c={tmp_path / 'chat.jsonl'}", "--out", str(tmp_path / "out")]) == 2
    assert "the model has no chat template" in capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(base).chat_template is None
