"""Calibration data: what is drawn, what is held out, and what a bad file is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from inlaid.quant.calibration import (
    CalibrationError,
    CalibrationSettings,
    Sequence,
    batches,
    encode,
    load_calibration,
    read_examples,
)
from tests.quant.tiny import write_base, write_data

TEMPLATE = (
    "{% for m in messages %}{{ 'w10 ' if m['role'] == 'user' else 'w11 ' }}{{ m['content'] }}{{ ' w12 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w11 ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return AutoTokenizer.from_pretrained(write_base(tmp_path_factory.mktemp("base")))


def test_a_seed_decides_and_nothing_is_both_fitted_and_held_out(tmp_path: Path, tokenizer) -> None:
    file = write_data(tmp_path / "data.jsonl", 0, 40)
    drawn = [load_calibration(file, tokenizer, CalibrationSettings(seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert set(drawn[0].fitting) != set(drawn[2].fitting)
    assert len(drawn[0].held_out) == 10
    assert not set(drawn[0].fitting) & set(drawn[0].held_out)


def test_the_budget_bounds_the_tokens(tmp_path: Path, tokenizer) -> None:
    file = write_data(tmp_path / "data.jsonl", 0, 40)
    few = load_calibration(file, tokenizer, CalibrationSettings(max_tokens=50)).fitting
    assert 0 < sum(len(sequence.ids) for sequence in few) <= 50
    all_of_them = load_calibration(file, tokenizer, CalibrationSettings()).fitting
    assert len(all_of_them) == 30
    assert all_of_them[: len(few)] == few


def test_completions_without_and_with_a_template(tokenizer) -> None:
    example = {"prompt": "w20 w21", "completion": "w30"}
    assert encode(example, tokenizer, 99) == Sequence((20, 21, 30, 2), 2)
    tokenizer.chat_template = TEMPLATE
    try:
        assert encode(example, tokenizer, 99) == Sequence((10, 20, 21, 12, 11, 30, 12), 5)
    finally:
        tokenizer.chat_template = None
    assert encode({"prompt": "w20 w21"}, tokenizer, 99) == Sequence((20, 21), 0)
    assert encode({"prompt": "w20 w21 w22"}, tokenizer, 2) == Sequence((20, 21), 0)
    with pytest.raises(CalibrationError, match="leaves no room"):
        encode(example, tokenizer, 2)


def test_batches_pad_on_the_right_and_mark_what_counts() -> None:
    parts = batches((Sequence((5, 6, 7), 2), Sequence((8,), 0), Sequence((9, 9, 9, 9), 1)), highlight=4.0, max_tokens=6)
    assert [part.ids_BS.tolist() for part in parts] == [[[8, 0, 0], [5, 6, 7]], [[9, 9, 9, 9]]]
    assert parts[0].weight_BS.tolist() == [[4, 0, 0], [1, 1, 4]]
    assert parts[0].answer_BS.tolist() == [[False, False, False], [False, False, True]]
    assert parts[1].answer_BS.tolist() == [[False, True, True, True]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no examples"),
        ("\n\n", "holds no examples"),
        ('{"prompt": "a"}\nnot json', "line 2 is not JSON"),
        ('{"text": "a"}', "line 1 has no text in a field 'prompt'"),
        ('{"prompt": ""}', "line 1 has no text"),
        ('{"prompt": 3}', "line 1 has no text"),
        ('["prompt"]', "line 1 has no text"),
        ('{"prompt": "a", "completion": 1}', "'completion' is not text"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(CalibrationError, match=words):
        read_examples(tmp_path / "data.jsonl")


def test_other_bad_input(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_examples(tmp_path / "nowhere")
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="as text"):
        read_examples(tmp_path / "data.jsonl")
    with pytest.raises(CalibrationError, match="two or more"):
        load_calibration(write_data(tmp_path / "one.jsonl", 0, 1), tokenizer, CalibrationSettings())
    for bad in ({"max_tokens": 0}, {"held_out": 1.0}, {"highlight": 0.0}):
        with pytest.raises(CalibrationError):
            CalibrationSettings(**bad)
