"""Variants are what they say: made once, found again, remade when what they depend on changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval.backend import BackendError, OpenBackend
from eval.blocks import BlocksBackend
from eval.oracle import OracleBackend, load_dense
from eval.server import ServerBackend
from eval.variants import Source, VariantError, Variants
from inlaid.adapters.peft import read_adapter
from inlaid.checkpoint import Checkpoint, dequantize
from inlaid.model.spec import read_spec
from inlaid.quant.aggregate import AGGREGATIONS, TaskHessian, combine
from inlaid.quant.baselines import scaled_weight
from inlaid.quant.blocks import BlockModel
from inlaid.quant.calibration import CalibrationSettings, batches, load_calibration
from inlaid.quant.grid import Grid
from inlaid.quant.hessian import block_hessians
from inlaid.quant.solver import round_to_nearest, solve

WORDS = "a b c d e f g h one two three four five six seven eight".split()
CALIBRATION = CalibrationSettings(max_tokens=200)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a random model of two layers with a tokenizer of sixteen words."""
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
    """Make two tasks with random adapters and a few lines each."""
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


def variants(
    base: Path,
    sources: dict[str, Source],
    folder: Path,
    generic: Path | None = None,
    widths: Sequence[int] = (8, 4, 3, 2),
) -> Variants:
    grids = {bits: Grid.of_width(bits, 32) for bits in widths}
    return Variants(base, sources, grids, folder, generic or sources["one"].calibration, CALIBRATION)


@pytest.mark.parametrize("name", ["rtn", "gptq", "gptq-mixed", "awq", "mlgptq-max", "mlgptq-minimax-loss"])
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
    made = [one() for one in variants(base, sources, tmp_path, widths=(8, 4)).bases(["rtn", f"mine={given}", "fp16"])]
    assert [(one.variant, one.bits) for one in made] == [("fp16", 16), ("rtn", 8), ("rtn", 4), ("mine", 2)]


def test_a_form_of_keys_and_values_is_a_variant(base: Path, sources: dict[str, Source], tmp_path: Path) -> None:
    """The base is the same folder, made once."""
    names = ("rtn+kv-int8", "fp16", "fp16+kv-fp8_e4m3", f"mine={base}+kv-int8")
    found = [make() for make in variants(base, sources, tmp_path, widths=(4,)).bases(names)]
    forms = [(one.variant, one.bits, one.kv) for one in found]
    assert forms[:2] == [("fp16", 16, "auto"), ("rtn+kv-int8", 4, "int8")]
    assert forms[2:] == [("fp16+kv-fp8", 16, "fp8"), ("mine+kv-int8", 16, "int8")]
    assert found[2].folder == found[3].folder == base
    with pytest.raises(VariantError, match=r"fp8_e5m2.*use fp8"):
        variants(base, sources, tmp_path).bases(("fp16+kv-fp8_e5m2",))
    backends: list[OpenBackend] = [OracleBackend, partial(BlocksBackend, "cpu"), partial(ServerBackend, "http://none")]
    for backend, name in zip(backends, ("oracle", "blocks", "server"), strict=True):
        with pytest.raises(BackendError, match=f"{name} has no int8 keys and values"):
            backend(base, {}, "int8")


def test_what_cannot_be_made_says_why(base: Path, sources: dict[str, Source], tmp_path: Path) -> None:
    with pytest.raises(VariantError, match=r"no variant 'nf4'; known: fp16, rtn, .*mlgptq-minimax"):
        variants(base, sources, tmp_path).bases(["nf4"])
    with pytest.raises(VariantError, match="needs tasks that have an adapter"):
        variants(base, {}, tmp_path, sources["one"].calibration).bases(["mlgptq-max"])
    quantized = variants(base, sources, tmp_path).base_of("rtn", 4).folder
    with pytest.raises(VariantError, match="quantized already"):
        variants(quantized, sources, tmp_path).bases(["rtn"])


def hessians_of(base: Path, source: Source, with_adapter: bool, seed: int) -> dict[str, tuple[torch.Tensor, float]]:
    """Return site -> second moments and tokens, made without the variants."""
    calibration = load_calibration(
        source.calibration, AutoTokenizer.from_pretrained(base), replace(CALIBRATION, seed=seed)
    )
    model, found = BlockModel(Checkpoint(base)), {}
    adapter = read_adapter(source.adapter, read_spec(base), torch.float32) if with_adapter else None
    streams = model.start(batches(calibration.fitting))
    for index in range(model.num_blocks):
        with model.loaded(index) as block:
            sites = block_hessians(model, block, index, adapter, streams, advance=True)
        for site, hessian in sites.hessians().items():
            found |= dict.fromkeys(sites.members[site], (hessian, sites.total))
    return found


@pytest.mark.parametrize(
    ("name", "task", "aggregation", "with_adapter"),
    [
        ("mlgptq-mean", None, "mean", True),
        ("mlgptq-max-diag", None, "max-diag", True),
        ("gptq-mixed", None, "sum", False),
        ("per-task", "two", "mean", True),
        ("awq", None, "sum", False),
    ],
)
def test_a_variant_solves_what_its_name_says(
    name: str, task: str | None, aggregation: str, with_adapter: bool, base: Path, sources: dict[str, Source],
    tmp_path: Path,
) -> None:  # fmt: skip
    """The folder dequantizes to what the solver gives for Hessians made by hand, at a seed of its own."""
    made = Checkpoint(variants(base, sources, tmp_path, widths=(3,)).base_of(name, 3, seed=1, task=task).folder)
    linear, grid = "model.layers.1.mlp.down_proj", Grid.of_width(3, 32)
    held = [
        hessians_of(base, source, with_adapter, 1)[linear] for one, source in sources.items() if task in (None, one)
    ]
    tasks = [TaskHessian(lambda h=hessian: h, tokens) for hessian, tokens in held]  # type: ignore[misc]
    weight_KN = Checkpoint(base).tensor(f"{linear}.weight").float().T.contiguous()
    hessian_KK = combine(aggregation, tasks)
    if name == "awq":
        assert torch.equal(made.tensor(f"{linear}.weight").T, scaled_weight(weight_KN, hessian_KK, grid))
    else:
        assert torch.equal(dequantize(made.linear(linear)), solve(weight_KN, hessian_KK, grid).weight_KN())


def test_seeds_and_the_bound_make_bases_of_their_own(base: Path, sources: dict[str, Source], tmp_path: Path) -> None:
    makes = variants(base, sources, tmp_path, widths=(4,)).bases(["rtn", "mlgptq-mean", "per-task", "fp16"], [0, 1])
    made = [make() for make in makes]
    assert [(one.variant, one.seed, one.task) for one in made] == [
        ("fp16", 0, None), ("rtn", 0, None), ("mlgptq-mean", 0, None), ("mlgptq-mean", 1, None),
        ("per-task", 0, "one"), ("per-task", 0, "two"), ("per-task", 1, "one"), ("per-task", 1, "two"),
    ]  # fmt: skip
    assert len({one.folder for one in made}) == len(made)


def test_all_is_every_variant(base: Path, sources: dict[str, Source], tmp_path: Path) -> None:
    makes = variants(base, sources, tmp_path, widths=(4,)).bases(["all"])
    assert len(makes) == 5 + len(AGGREGATIONS) + len(sources)
