"""Calibration data: what is drawn, what is held out, and what a bad file is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from inlaid.quant.calibration import CalibrationSettings, Sequence, batches, encode, load_calibration
from inlaid.quant.examples import CalibrationError, Example
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
    example = Example((("user", "w20 w21"),), "w30")
    assert encode(example, tokenizer, 99) == Sequence((20, 21, 30, 2), 2)
    tokenizer.chat_template = TEMPLATE
    try:
        assert encode(example, tokenizer, 99) == Sequence((10, 20, 21, 12, 11, 30, 12), 5)
    finally:
        tokenizer.chat_template = None
    assert encode(Example((("user", "w20 w21"),), ""), tokenizer, 99) == Sequence((20, 21), 0)
    assert encode(Example((("user", "w20 w21 w22"),), ""), tokenizer, 2) == Sequence((20, 21), 0)
    with pytest.raises(CalibrationError, match="leaves no room"):
        encode(example, tokenizer, 2)


def test_batches_pad_on_the_right_and_mark_what_counts() -> None:
    parts = batches((Sequence((5, 6, 7), 2), Sequence((8,), 0), Sequence((9, 9, 9, 9), 1)), highlight=4.0, max_tokens=6)
    assert [part.ids_BS.tolist() for part in parts] == [[[8, 0, 0], [5, 6, 7]], [[9, 9, 9, 9]]]
    assert parts[0].weight_BS.tolist() == [[4, 0, 0], [1, 1, 4]]
    assert parts[0].answer_BS.tolist() == [[False, False, False], [False, False, True]]
    assert parts[1].answer_BS.tolist() == [[False, True, True, True]]


def test_a_conversation_goes_through_the_template(tokenizer) -> None:
    turns = (("system", "w40"), ("user", "w20"), ("assistant", "w21"), ("user", "w22"))
    example = Example(turns, "w30", "data.jsonl, line 3", is_chat=True)
    with pytest.raises(CalibrationError, match="line 3 has `messages`, but the model has no chat template"):
        encode(example, tokenizer, 99)
    tokenizer.chat_template = TEMPLATE
    try:
        assert encode(example, tokenizer, 99).ids[-3:] == (11, 30, 12)
        assert encode(example, tokenizer, 99).answer == len(encode(example, tokenizer, 99).ids) - 2
    finally:
        tokenizer.chat_template = None


def test_it_is_said_what_was_read(tmp_path: Path, tokenizer) -> None:
    about = load_calibration(write_data(tmp_path / "data.jsonl", 0, 8), tokenizer, CalibrationSettings()).about
    assert about.startswith(
        "8 of 8 lines with an answer, without a chat template; 6 to fit on, 2 held out; the first is"
    )
    (tmp_path / "texts.jsonl").write_text('{"text": "w20 w21"}\n' * 4)
    about = load_calibration(tmp_path / "texts.jsonl", tokenizer, CalibrationSettings()).about
    assert about == "4 texts as they are; 3 to fit on, 1 held out; the first is 'w20 w21'"


def test_other_bad_input(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(CalibrationError, match="two or more"):
        load_calibration(write_data(tmp_path / "one.jsonl", 0, 1), tokenizer, CalibrationSettings())
    for bad in ({"max_tokens": 0}, {"held_out": 1.0}, {"highlight": 0.0}):
        with pytest.raises(CalibrationError):
            CalibrationSettings(**bad)
