"""Tokenizers in the layouts of known models: ids, tokens and templates are those that transformers reads, whichever way
a folder takes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from inlaid.text import tokenizer_files
from inlaid.text.tokenizer import Tokenizer
from inlaid.text.tokenizer_files import as_transformers, read_tokenizer
from tests.text import folders

DEMO = Path(__file__).parents[2] / "models" / "demo" / "base"
TEXTS = (
    "the thing", " the  thing", "", " ", "a", "1234567", "é語🙂\u0301e\u0301", "x\n\n\ny \t z", "don't you'LL",
    "<|im_start|>user\nthe thing<|im_end|>\n", "a <pad> b<tool>c <image>the", "<s>the</s> the<unk>", "\u2581the",
)  # fmt: skip


def same(folder: Path) -> None:
    """Compare all that the product asks of a tokenizer with transformers."""
    ours, oracle = Tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    backend: Any = oracle.backend_tokenizer
    wrapped = as_transformers(folder)
    assert (wrapped.chat_template, wrapped.eos_token_id) == (oracle.chat_template, oracle.eos_token_id)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, special)
            assert ids == oracle.encode(text, add_special_tokens=special), text
            assert ids == wrapped(text, add_special_tokens=special)["input_ids"], text
            for skip in (True, False):
                assert ours.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip), text
    assert ours.vocab_size == len(oracle)
    assert repr(ours._fast.get_added_tokens_decoder()) == repr(backend.get_added_tokens_decoder())
    files = read_tokenizer(folder)
    assert (files.chat_template, files.special_tokens) == (oracle.chat_template, oracle.special_tokens_map)
    chat = [{"role": "user", "content": "the thing"}, {"role": "assistant", "content": "1\n"}]
    if oracle.chat_template:
        wanted = oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ours.template.render(chat) == wanted


@pytest.mark.parametrize("layout", folders.LAYOUTS)
def test_a_layout_is_read_as_transformers_reads_it(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders.write(tmp_path / "base", layout)
    if folders.LAYOUTS[layout][2]:
        monkeypatch.setattr(tokenizer_files, "_read_other", None)
    same(folder)


def test_the_demo_is_read_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "_read_other", None)
    same(DEMO)


def test_digits_are_split_as_tokenizer_json_says(tmp_path: Path) -> None:
    """The class GPT2Tokenizer, which SmolLM2 names, knows nothing of digits."""
    folder = folders.write(tmp_path / "base", "smollm, generic")
    ids = [Tokenizer(folder).encode(text) for text in TEXTS]
    for kind in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        change(folder, tokenizer_class=kind)
        assert [Tokenizer(folder).encode(text) for text in TEXTS] == ids
    assert len(Tokenizer(folder).encode("1234567")) == 7


def change(folder: Path, **values: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_templates_in_files_of_their_own_come_first(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "base", "llama 3")
    change(folder, chat_template=[{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}])
    same(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}é\n")
    same(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    same(folder)
    assert Tokenizer(folder).template.render([{"role": "user", "content": ""}], [{}]) == "tools"


def test_forms_of_old_versions_are_left_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders.write(tmp_path / "base", "smollm, generic")
    (folder / "special_tokens_map.json").write_text(json.dumps({"sep_token": "<sep>"}))
    same(folder)
    assert read_tokenizer(folder).special_tokens["sep_token"] == "<sep>"
    monkeypatch.setattr(tokenizer_files, "_read_other", None)
    with pytest.raises(ValueError, match="NoneType"):
        Tokenizer(folder)
    (folder / "special_tokens_map.json").unlink()
    Tokenizer(folder)
    change(folder, fix_mistral_regex=True)
    with pytest.raises(ValueError, match="NoneType"):
        Tokenizer(folder)


def test_special_tokens_can_be_plain_text_for_a_whole_tokenizer(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "base", "llama 3")
    change(folder, split_special_tokens=True)
    same(folder)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "base", "llama 3")
    os.mkfifo(folder / "chat_template.jinja")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not a regular file"):
        Tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    change(folder, pad_token={"content": "<pad>"})
    with pytest.raises(ValueError, match="is no token"):
        Tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[1")
    with pytest.raises(ValueError, match=f"the tokenizer of {folder} cannot be read"):
        Tokenizer(folder)
