"""Prompts have exactly the tokens asked for, by the tokenizer that will count them."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlaid.workload.prompts import BLOCK_TOKENS, PromptMaker, TokenizerFile


class WordTokens:
    """One token a word, and a beginning-of-sequence token where special tokens are asked for."""

    def encode(self, text: str, special: bool) -> list[int]:
        return ([0] if special else []) + [1 + len(word) * 7 + ord(word[0]) for word in text.split()]


@pytest.fixture(scope="module")
def byte_pair_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train a small real tokenizer: byte-level pairs of a little text, with a beginning-of-sequence token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(["the way of the water is the way of time and the hand of the day"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path.parent)


@pytest.mark.parametrize("length", [1, 2, 17, 512])
def test_ids_are_exact_and_repeatable(length: int) -> None:
    maker = PromptMaker("ids", WordTokens(), seed=3)
    prompt = maker.make(5, length)
    assert isinstance(prompt, list)
    assert len(prompt) == length
    assert prompt == PromptMaker("ids", WordTokens(), seed=3).make(5, length)
    assert length < 5 or prompt != maker.make(6, length)


@pytest.mark.parametrize("length", [2, 3, 40, 300])
@pytest.mark.parametrize("special", [True, False])
def test_text_is_exact_for_a_real_tokenizer(byte_pair_tokenizer: str, length: int, special: bool) -> None:
    tokens = TokenizerFile(byte_pair_tokenizer)
    maker = PromptMaker("text", tokens, seed=0, special=special)
    for index in range(5):
        prompt = maker.make(index, length)
        assert isinstance(prompt, str)
        assert len(tokens.encode(prompt, special)) == length


def test_shared_blocks_are_shared_prefixes() -> None:
    maker = PromptMaker("ids", WordTokens(), seed=0)
    first, second = maker.from_blocks((4, 5), 1000), maker.from_blocks((4, 6), 700)
    assert (len(first), len(second)) == (1000, 700)
    assert first[:BLOCK_TOKENS] == second[:BLOCK_TOKENS]
    assert first[BLOCK_TOKENS:700] != second[BLOCK_TOKENS:700]


def test_words_need_no_tokenizer() -> None:
    prompt = PromptMaker("words", None, seed=0).make(0, 9)
    assert isinstance(prompt, str)
    assert len(prompt.split()) == 9


def test_a_missing_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tokenizer"):
        PromptMaker("ids", None, seed=0)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json there"):
        TokenizerFile(str(tmp_path))
