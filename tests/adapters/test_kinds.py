"""Kinds of adapters that do more than add B A to a linear, exact against peft on a CPU: DoRA, biases of B, PiSSA and
OLoRA unconverted, ranks above 256, changes of the embedding and the head. Each is refused where it cannot be computed.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from inlaid.adapters.adapter import AdapterError
from inlaid.adapters.base import BaseLinears
from inlaid.adapters.peft import decomposes_the_base, read_adapter
from inlaid.checkpoint import Checkpoint, dequantize
from inlaid.config import AdapterConfig, EngineConfig
from inlaid.engine.request import SamplingParams
from inlaid.llm import LLM
from inlaid.model.spec import read_spec
from inlaid.quant.grid import Grid
from inlaid.quant.quantize import quantize
from inlaid.quant.settings import Gate, Settings, TaskSource
from tests.adapters.test_peft import edit_config, edit_weights
from tests.quant.tiny import write_base, write_data

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": ALL},
    "dora": {"r": 4, "target_modules": ALL, "use_dora": True},
    "dora of some": {"r": 3, "target_modules": ["k_proj", "up_proj"], "use_dora": True, "use_rslora": True},
    "biases": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_bias": True, "lora_alpha": 3},
    "pissa": {"r": 4, "target_modules": ALL, "init_lora_weights": "pissa"},
    "olora": {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora", "lora_alpha": 2},
    "rank 300": {"r": 300, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 20},
}
VOCABULARY: dict[str, dict[str, Any]] = {
    "head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "embedding": {"r": 3, "target_modules": ["embed_tokens"], "use_rslora": True},
    "both": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "down_proj"]},
    "tokens": {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [5, 9, 30]},
    "tokens of each": {
        "r": 4,
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 12], "lm_head": [7]},
    },
    "whole head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embedding": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}
PROMPTS = [[5, 9, 11, 30, 7], [40, 3, 8], [12] * 20]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("kinds") / "base", "qwen2", tied=True)  # its q, k and v have biases


def train(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """Write an adapter whose parameters were moved at random from where peft begins."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a tied head is adapted alone
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"lora_alpha": 8, **settings}))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter) * (1 + parameter.detach().abs().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft 0.21 takes the bias of B for a shard
        wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    return {
        kind: train(base, base.parent / kind.replace(" ", "-"), seed, **settings)
        for seed, (kind, settings) in enumerate((KINDS | VOCABULARY).items())
    }


@pytest.fixture(scope="module")
def llm(base: Path, folders: dict[str, Path]) -> LLM:
    adapters = {name: str(folder) for name, folder in folders.items()}
    config = EngineConfig(model=str(base), max_model_len=64, adapters=AdapterConfig(max_lora_rank=300))
    return LLM(str(base), adapters, config=config)


def by_peft(base: Path, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def oracle(base: Path, folder: Path, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Return peft's greedy tokens and the log probabilities of the first."""
    model = by_peft(base, folder)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        first = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist(), first


@pytest.mark.parametrize("kind", KINDS | VOCABULARY)
def test_each_kind_is_what_peft_computes(kind: str, base: Path, folders: dict[str, Path], llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0, logprobs=5)
    plain = llm.generate([PROMPTS[0]], params)[0]
    for prompt, answer in zip(PROMPTS, llm.generate(PROMPTS, params, kind), strict=True):
        tokens, first = oracle(base, folders[kind], prompt)
        assert answer.tokens == tokens
        assert answer.logprobs is not None
        for token, value in answer.logprobs[0].top:
            assert value == pytest.approx(float(first[token]), abs=1e-4)
    assert llm.generate([PROMPTS[0]], params)[0].tokens == plain.tokens, "rows without the adapter stay as they are"


def test_those_that_decompose_the_base_are_known_before_they_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    assert [kind for kind, folder in folders.items() if decomposes_the_base(folder)] == ["pissa", "olora"]
    assert not decomposes_the_base(tmp_path / "none")


def test_kinds_share_a_batch(llm: LLM) -> None:
    """Each row of a step has its own adapter's outputs, fused siblings and all."""
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)
    kinds = list(KINDS | VOCABULARY)
    alone = {kind: llm.generate([PROMPTS[0]], params, kind)[0].tokens for kind in kinds}
    together = llm.generate([PROMPTS[0]] * len(kinds), params, kinds)
    assert [answer.tokens for answer in together] == list(alone.values())


def test_a_dora_adapter_has_the_norms_of_the_quantized_base(tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "quantized"
    data = write_data(tmp_path / "data.jsonl", 0)
    settings = Settings(Grid.of_width(4, 32), aggregation="mean")
    quantize(base, [TaskSource.parse(f"one=none:{data}")], settings, out, gate=Gate(force=True))
    checkpoint = Checkpoint(out)
    dense = AutoModelForCausalLM.from_pretrained(base)
    weights = dense.state_dict()
    for name in checkpoint.linears:
        weights[f"{name}.weight"].copy_(dequantize(checkpoint.linear(name)).T)
    dense.save_pretrained(tmp_path / "dequantized")
    dora = train(base, tmp_path / "dora", 0, **KINDS["dora"])
    tokens, _ = oracle(tmp_path / "dequantized", dora, PROMPTS[0])
    llm = LLM(str(out), {"dora": str(dora)}, max_model_len=64)
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)
    assert llm.generate([PROMPTS[0]], params, "dora")[0].tokens == tokens
    with pytest.raises(AdapterError, match="which a quantized one does not tell; serve it"):
        read(train(base, tmp_path / "pissa", 0, **KINDS["pissa"]), base, BaseLinears(out, True))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    base = write_base(tmp_path_factory.mktemp("untied") / "base")
    kinds = ("both", "tokens", "whole head")
    return base, {kind: train(base, base.parent / kind.replace(" ", "-"), 1, **VOCABULARY[kind]) for kind in kinds}


def test_an_untied_head_is_changed_by_its_own_tensors_alone(untied: tuple[Path, dict[str, Path]]) -> None:
    base, folders = untied
    llm = LLM(str(base), {kind: str(folder) for kind, folder in folders.items()}, max_model_len=64)
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0, prompt_logprobs=0)
    for kind, folder in folders.items():
        answer = llm.generate([PROMPTS[0]], params, kind)[0]
        assert answer.tokens == oracle(base, folder, PROMPTS[0])[0]
        with torch.no_grad():
            logprobs = by_peft(base, folder)(input_ids=torch.tensor([PROMPTS[0]])).logits[0].log_softmax(-1)
        assert answer.prompt_logprobs is not None
        for at, found in enumerate(answer.prompt_logprobs[1:]):
            assert found is not None
            assert found.logprob == pytest.approx(float(logprobs[at, PROMPTS[0][at + 1]]), abs=1e-4)


def test_a_change_of_the_vocabulary_is_checked(untied: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, folders = untied
    linears = BaseLinears(base, True)
    with pytest.raises(AdapterError, match="computed for serving only; quantize without it"):
        read(folders["both"], base)
    other = write_base(tmp_path / "other", seed=5)
    with pytest.raises(AdapterError, match=r"base_layer.weight is not this base's weight"):
        read(folders["both"], other, BaseLinears(other, True))
    folder = Path(shutil.copytree(folders["tokens"], tmp_path / "tokens"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"trainable_token_indices": [5, 9]}, "where the config and the base account for"),
        ({"trainable_token_indices": [5, 9, 96]}, "not below 96"),
        ({"trainable_token_indices": [5, 5, 9]}, "names a token twice"),
        ({"trainable_token_indices": {"norm": [1]}}, "is not supported; give a list"),
        ({"trainable_token_indices": [5], "modules_to_save": ["embed_tokens"]}, "changed in two ways at once"),
        ({"trainable_token_indices": None, "modules_to_save": None}, "for embed_tokens, which the config does not"),
        ({"modules_to_save": ["norm"]}, "modules_to_save 'norm' is not supported"),
    ]
    for settings, said in cases:
        with pytest.raises(AdapterError, match=said):
            read(edit_config(folder, **settings), base, linears)


def read(folder: Path, base: Path, linears: BaseLinears | None = None, rank: int = 256) -> Any:
    return read_adapter(folder, read_spec(base), torch.float32, rank, base=linears)


@pytest.mark.parametrize("kind", ["dora", "biases", "pissa", "olora"])
def test_without_the_base_each_is_refused_by_name(kind: str, base: Path, folders: dict[str, Path]) -> None:
    name = {"dora": "DoRA", "biases": "lora_bias"}.get(kind, kind)
    with pytest.raises(AdapterError, match=f"{name} is computed from the base's weights"):
        read(folders[kind], base)
    on_gpu = BaseLinears(base, scales_outputs=False)
    if kind in ("dora", "biases"):
        with pytest.raises(AdapterError, match=f"{name} changes a linear's outputs.*serve with --device cpu"):
            read(folders[kind], base, on_gpu)
    else:
        assert {entry.rank for entry in read(folders[kind], base, on_gpu).entries} == {8}, "twice its rank"


def test_a_rank_above_the_limit_is_refused_with_the_flag(base: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(AdapterError, match=r"rank 300, above the limit of 256 \(--max-lora-rank\)"):
        read(folders["rank 300"], base)


def test_vectors_are_checked(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    linears = BaseLinears(base, True)
    folder = Path(shutil.copytree(folders["dora"], tmp_path / "a"))
    name = next(name for name in load_file(folder / "adapter_model.safetensors") if "magnitude" in name)

    def changed(tensors: dict[str, torch.Tensor], value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**tensors, name: value}

    for value, said in (
        (torch.zeros(3), "not one number for each of"),
        (torch.full((64,), float("nan")), "holds NaN or infinity|not one number"),
    ):
        edit_weights(folder, lambda tensors, value=value: changed(tensors, value))
        with pytest.raises(AdapterError, match=said):
            read(folder, base, linears)
    whole = load_file(folders["dora"] / "adapter_model.safetensors")
    save_file({key: tensor for key, tensor in whole.items() if key != name}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="has no lora_magnitude_vector"):
        read(folder, base, linears)
    save_file(whole, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="the config says nothing of DoRA"):
        read(edit_config(folder, use_dora=False), base, linears)
