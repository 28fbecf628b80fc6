"""Variants are what they say: made once, found again, remade when what they depend on changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval.oracle import load_dense
from eval.variants import Source, VariantError, Variants
from inlaid.checkpoint import Checkpoint, dequantize
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.grid import Grid
from inlaid.quant.solver import round_to_nearest

WORDS = "a b c d e f g h one two three four five six seven eight".split()
CALIBRATION = CalibrationSettings(max_tokens=400)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers with a tokenizer of sixteen words."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<end>": 1} | {word: index + 2 for index, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Two tasks with random adapters and a few lines each."""
    from peft import LoraConfig, get_peft_model

    folder, found = tmp_path_factory.mktemp("tasks"), {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(base),
            LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        )
        model.save_pretrained(folder / name)
        lines = [{"prompt": " ".join(WORDS[(seed + i) % 9 :]), "completion": WORDS[i % 16]} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[name] = Source(folder / name, folder / f"{name}.jsonl")
    return found


def variants(base: Path, sources: dict[str, Source], folder: Path, generic: Path | None = None) -> Variants:
    return Variants(base, sources, 32, folder, generic or sources["one"].calibration, CALIBRATION)


@pytest.mark.parametrize("name", ["rtn", "gptq", "gptq-mixed", "awq", "mlgptq-max", "mlgptq-minimax"])
def test_every_variant_is_a_base_near_the_original(
    name: str, base: Path, sources: dict[str, Source], tmp_path: Path
) -> None:
    """And nearer with more bits; all but awq are GPTQ folders of the width asked for."""
    original, far = load_dense(base), {}
    for bits in (8, 3):
        made = variants(base, sources, tmp_path).base_of(name, bits)
        checkpoint = Checkpoint(made.folder)
        assert checkpoint.is_quantized == (name != "awq")
        if checkpoint.is_quantized:
            assert {checkpoint.linear(linear).bits for linear in checkpoint.linears} == {bits}
        assert (made.folder / "tokenizer.json").exists()
        loaded, ids = load_dense(made.folder), torch.arange(2, 18)[None]
        with torch.no_grad():
            far[bits] = float((loaded(ids).logits - original(ids).logits).abs().mean())
    assert 0 < far[8] < far[3]


def test_rounding_is_the_quantizers_own(base: Path, sources: dict[str, Source], tmp_path: Path) -> None:
    made = Checkpoint(variants(base, sources, tmp_path).base_of("rtn", 4).folder)
    name = "model.layers.1.mlp.down_proj"
    weight_KN = Checkpoint(base).tensor(f"{name}.weight").float().T.contiguous()
    expected = round_to_nearest(weight_KN, Grid(bits=4, group_size=32)).weight_KN()
    assert torch.equal(dequantize(made.linear(name)), expected)


def test_a_variant_is_made_once_and_again_when_what_it_needs_changes(
    base: Path, sources: dict[str, Source], tmp_path: Path
) -> None:
    first = variants(base, sources, tmp_path).base_of("gptq-mixed", 4).folder
    stamp = (first / "config.json").stat().st_mtime_ns
    assert variants(base, sources, tmp_path).base_of("gptq-mixed", 4).folder == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    moved = tmp_path / "two.jsonl"
    moved.write_text(sources["two"].calibration.read_text() * 2)
    other = {**sources, "two": Source(sources["two"].adapter, moved)}
    assert variants(base, other, tmp_path).base_of("gptq-mixed", 4).folder != first
    rounded = variants(base, sources, tmp_path).base_of("rtn", 4).folder
    assert variants(base, other, tmp_path).base_of("rtn", 4).folder == rounded


def test_a_grid_starts_with_full_precision(base: Path, sources: dict[str, Source], tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(variants(base, sources, tmp_path).base_of("rtn", 2).folder, given)
    made = [one() for one in variants(base, sources, tmp_path).bases(["rtn", f"mine={given}", "fp16"], [8, 4])]
    assert [(one.variant, one.bits) for one in made] == [("fp16", 16), ("rtn", 8), ("rtn", 4), ("mine", 2)]


def test_what_cannot_be_made_says_why(base: Path, sources: dict[str, Source], tmp_path: Path) -> None:
    with pytest.raises(VariantError, match=r"no variant 'nf4'; known: fp16, rtn, .*mlgptq-minimax"):
        variants(base, sources, tmp_path).bases(["nf4"], [4])
    with pytest.raises(VariantError, match="needs tasks that have an adapter"):
        variants(base, {}, tmp_path, sources["one"].calibration).bases(["mlgptq-max"], [4])
    quantized = variants(base, sources, tmp_path).base_of("rtn", 4).folder
    with pytest.raises(VariantError, match="quantized already"):
        variants(quantized, sources, tmp_path).bases(["rtn"], [4])
