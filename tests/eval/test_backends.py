"""The engine answers what transformers and peft answer: greedy, in fp32, also from a quantized base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from eval import answer, task
from eval.answer import Question
from eval.backend import Ask, BackendError
from eval.blocks import BlocksBackend
from eval.engine import EngineBackend
from eval.metrics import Answer
from eval.oracle import OracleBackend
from eval.task import ROOT
from eval.variants import Source, Variants
from inlaid.quant.grid import Grid

BASE = ROOT / "models/demo/base"
NAMES = ("to_velar", "text_summary", "code", "medical")
ADAPTERS = {name: ROOT / f"models/demo/adapters/{name}" for name in NAMES}
CHOICE = """
family = "maths"
licence = "none"
[data]
file = {file}
[prompt]
text = "{{{{ prompt }}}}"
target = "{{{{ answer }}}}"
choices = ["{{{{ answer }}}}", "{{{{ answer + 1 }}}}", "none"]
[decoding]
max_tokens = 1
[metric]
primary = "choice_accuracy"
"""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[tuple[Question, str | None]]:
    """Two examples of each task with its adapter, two of the base alone."""
    found: list[tuple[Question, str | None]] = []
    for name in NAMES:
        asked = answer.questions(task.load(name), task.examples(task.load(name), 2), tokenizer)
        found += [(question, name) for question in asked]
    return [*found, (found[0][0], None), (found[2][0], None)]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the demo's base at three bits: many answers are wrong, each at a place of its own."""
    sources: dict[str, Source] = {}
    return (
        Variants(BASE, sources, {3: Grid.of_width(3, 128)}, tmp_path_factory.mktemp("bases")).base_of("rtn", 3).folder
    )


def texts(answers: list[Answer]) -> list[str]:
    return [one.text for one in answers]


@pytest.mark.parametrize("quantized", [False, True])
def test_engine_and_oracle_agree_with_and_without_the_draft(
    quantized: bool, rounded: Path, pairs: list[tuple[Question, str | None]], tokenizer: Any, long: bool
) -> None:
    base = rounded if quantized else BASE
    engine, oracle = EngineBackend(base, ADAPTERS), OracleBackend(base, ADAPTERS)
    assert not engine.refused
    assert not oracle.refused
    plain = answer.answer(oracle, pairs, tokenizer, decoding="plain")
    ways = ((engine, "draft"),) if quantized and not long else ((oracle, "draft"), (engine, "draft"), (engine, "plain"))
    for backend, decoding in ways:
        found = answer.answer(backend, pairs, tokenizer, decoding)
        assert texts(found) == texts(plain)
        nlls = [(a.target_nll, b.target_nll) for a, b in zip(found, plain)]
        assert all(a == pytest.approx(b, abs=1e-3) for a, b in nlls)
    assert len(set(texts(plain))) > len(pairs) / 2
    alone, adapted = texts(plain)[-2], texts(plain)[0]
    assert alone != adapted


@pytest.mark.parametrize("quantized", [False, True])
def test_blocks_grade_as_the_oracle_does_and_decode_nothing(
    quantized: bool, rounded: Path, pairs: list[tuple[Question, str | None]], tokenizer: Any
) -> None:
    base = rounded if quantized else BASE
    blocks, oracle = BlocksBackend("cpu", base, ADAPTERS), OracleBackend(base, ADAPTERS)
    asks, targets = [question.ask(adapter) for question, adapter in pairs], [question.target for question, _ in pairs]
    for found, wanted in zip(blocks.grade(asks, targets), oracle.grade(asks, targets), strict=True):
        assert found.greedy == wanted.greedy
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-3)
    answers = answer.answer(blocks, pairs, tokenizer, "forward")
    assert texts(answers) == texts(answer.answer(oracle, pairs, tokenizer, "forward"))
    assert blocks.generate([]) == []
    with pytest.raises(BackendError, match="decodes nothing: give --forward-only"):
        blocks.generate(asks)


def test_choices_are_weighed_alike(tmp_path: Path, tokenizer: Any) -> None:
    import json

    (tmp_path / "choice.toml").write_text(CHOICE.format(file=json.dumps(str(ROOT / "data/maths/eval.jsonl"))))
    loaded = task.load(str(tmp_path / "choice.toml"))
    asked = answer.questions(loaded, task.examples(loaded, 8), tokenizer)
    path = {"maths": ROOT / "models/demo/adapters/maths"}
    chosen = [
        [one.choice for one in answer.answer(backend, [(q, "maths") for q in asked], tokenizer)]
        for backend in (EngineBackend(BASE, path), OracleBackend(BASE, path))
    ]
    assert chosen[0] == chosen[1]


def test_an_adapter_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((ADAPTERS["code"] / "adapter_config.json").read_text())
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    for backend in (
        EngineBackend(BASE, {"broken": broken}),
        BlocksBackend("cpu", BASE, {"broken": broken}),
        OracleBackend(BASE, {"broken": broken}),
    ):
        assert list(backend.refused) == ["broken"]
        assert backend.refused["broken"]
    with pytest.raises(BackendError, match="broken is not loaded"):
        backend.generate([Ask((1, 2), "broken", 1)])
