"""Shared parts of the oracle tests: tiny random models of every family, random PEFT adapters, inlaid's engine around
them, and transformers + peft as the judge."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from inlaid.adapters.peft import read_adapter
from inlaid.checkpoint import (
    Checkpoint,
    QuantizedLinear,
    QuantSpec,
    dequantize,
    from_codes,
    quantization_config,
    to_tensors,
)
from inlaid.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from inlaid.engine.engine import Engine, make_engine
from inlaid.engine.request import NewRequest, Output, SamplingParams
from inlaid.worker.lead import MemberProcess
from inlaid.worker.loading import LoadedModel, load_model

VOCAB = 199
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def family_config(name: str) -> PretrainedConfig:
    """Return a tiny configuration of each family and rope type that inlaid serves."""
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500000.0,
    }
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    sliding = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
    configs: dict[str, PretrainedConfig] = {
        "llama": LlamaConfig(**_SHARED),
        "llama-tied": LlamaConfig(**_SHARED, tie_word_embeddings=True),
        "llama-bias": LlamaConfig(**_SHARED, attention_bias=True, mlp_bias=True),
        "llama-wide-heads": LlamaConfig(**_SHARED, head_dim=32),
        "llama3": LlamaConfig(**_SHARED, rope_parameters=llama3),
        "llama-linear": LlamaConfig(**_SHARED, rope_parameters=linear),
        "llama-dynamic": LlamaConfig(**_SHARED, rope_parameters=dynamic),
        "llama-yarn": LlamaConfig(**_SHARED, rope_parameters=yarn),
        "mistral": MistralConfig(**_SHARED, sliding_window=12),
        "qwen2": Qwen2Config(**_SHARED),
        "qwen2-sliding": Qwen2Config(**_SHARED, **sliding),
        "qwen3": Qwen3Config(**_SHARED, head_dim=32),
    }
    return configs[name]


FAMILIES = (
    "llama", "llama-tied", "llama-bias", "llama-wide-heads", "llama3", "llama-linear", "llama-dynamic", "llama-yarn",
    "mistral", "qwen2", "qwen2-sliding", "qwen3",
)  # fmt: skip


def save_model(folder: Path, config: PretrainedConfig, seed: int = 0, **save: Any) -> None:
    """Random weights; biases and norms too, so that a forgotten one shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder, **save)


def save_adapter(folder: Path, model: Path, seed: int, **settings: Any) -> None:
    """Write a random adapter (both factors) with peft itself."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    adapted.save_pretrained(folder)


def save_adapters(folders: Iterable[Path], model: Path) -> None:
    """Write random adapters of every kind, one after the other, over a model that is read once."""
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    for index, folder in enumerate(folders):
        torch.manual_seed(index)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **adapter_settings(index))
        adapted = get_peft_model(base, config)
        adapted.save_pretrained(folder)
        base = adapted.unload()


def prompts(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    """Random token ids of mixed lengths."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=random).tolist()
    return [torch.randint(2, VOCAB, (length,), generator=random).tolist() for length in lengths]


def adapter_settings(index: int) -> dict[str, Any]:
    """Adapters that differ in rank, targets, scaling and layers."""
    kinds: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 8, "lora_alpha": 8, "target_modules": ALL_LINEAR},
        {"r": 16, "lora_alpha": 16, "target_modules": ALL_LINEAR, "use_rslora": True},
        {"r": 2, "lora_alpha": 4, "target_modules": ["gate_proj", "down_proj"]},
        {"r": 3, "lora_alpha": 5, "target_modules": ["o_proj", "k_proj"], "layers_to_transform": [0, 2]},
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 9, r"layers\.1\.mlp\.up_proj": 1},
            "alpha_pattern": {"down_proj": 12},
        },
        {"r": 5, "lora_alpha": 10, "target_modules": r".*\.1\.self_attn\.(q|o)_proj"},
    ]
    return kinds[index % len(kinds)]


@dataclass
class Answer:
    """The answer of inlaid to one request."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float | None]
    num_cached: int


def load_engine(model: Path, **changes: Any) -> tuple[Engine, LoadedModel]:
    """inlaid's engine in this process, on a clock that counts calls."""
    cache = CacheConfig(block_size=changes.pop("block_size", 4), num_blocks=changes.pop("num_blocks", 600))
    cache = replace(cache, enable_prefix_caching=changes.pop("prefix", True), **changes.pop("cache", {}))
    start_member = changes.pop("start_member", MemberProcess)
    config = EngineConfig(
        model=str(model),
        device="cpu",
        max_model_len=changes.pop("max_model_len", 0),
        cache=cache,
        **changes.pop("engine", {}),
        adapters=AdapterConfig(max_loras=changes.pop("max_loras", 32), **changes.pop("adapters", {})),
        scheduler=SchedulerConfig(**changes),
    )
    loaded = load_model(config, progress=False, start_member=start_member)
    ticks = iter(range(10**9))
    unbound = replace(config, adapters=replace(config.adapters, adapter_timeout=math.inf))  # calls are no seconds
    engine = make_engine(
        unbound,
        loaded.runner,
        lambda: float(next(ticks)),
        num_blocks=loaded.num_blocks,
        max_model_len=loaded.max_model_len,
        adapters=loaded.adapters,
        eos_ids=loaded.spec.eos_token_ids,
        base_version=loaded.base_version,
        make_grammar=loaded.grammars,
        pool=loaded.runner.pool,
    )
    return engine, loaded


def add_adapter(loaded: LoadedModel, name: str, folder: Path) -> str:
    return loaded.adapters.add(name, read_adapter(folder, loaded.spec, loaded.dtype))


def ask(name: str, prompt: list[int], adapter: str | None = None, max_tokens: int = 12, **params: Any) -> NewRequest:
    """Return a greedy request with log probabilities unless told otherwise."""
    settings = {"temperature": 0.0, "logprobs": 0, "ignore_eos": True, **params}
    return NewRequest(id=name, prompt=prompt, adapter=adapter, params=SamplingParams(max_tokens=max_tokens, **settings))


def serve(engine: Engine, requests: list[NewRequest]) -> dict[str, Answer]:
    """Add all, step until all have ended, and leave the engine whole."""
    answers = {request.id: Answer([], [], [], 0) for request in requests}
    for request in requests:
        engine.add(request)
    for _ in range(10_000):
        if not engine.has_work:
            break
        for output in engine.step():
            _note(answers[output.id], output)
        if engine.idle:
            time.sleep(0.001)  # an adapter is on its way
    assert not engine.has_work, "the engine did not finish"
    engine.scheduler.check_whole()
    return answers


def _note(answer: Answer, output: Output) -> None:
    assert output.refusal is None, output.refusal
    answer.tokens += output.tokens
    answer.logprobs += [entry.logprob for entry in output.logprobs or []]
    answer.num_cached = max(answer.num_cached, output.num_cached)
    if output.prompt_logprobs:
        answer.prompt_logprobs = [None if entry is None else entry.logprob for entry in output.prompt_logprobs]


class Judge:
    """transformers + peft over one base and its adapters, in fp32."""

    def __init__(self, model: Path, adapters: dict[str, Path]) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        self.model: Any = base
        for name, folder in adapters.items():
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(folder, name)
            else:
                self.model = PeftModel.from_pretrained(base, folder, adapter_name=name)
        self.model.eval()

    @torch.inference_mode()
    def logits(self, tokens: list[int], adapter: str | None) -> torch.Tensor:
        ids = torch.tensor([tokens])
        if adapter is not None:
            self.model.set_adapter(adapter)
            return self.model(ids).logits[0]
        if isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                return self.model(ids).logits[0]
        return self.model(ids).logits[0]

    def check(self, request: NewRequest, answer: Answer) -> None:
        """Every token is the judge's most likely one after the same text, with the judge's log probability."""
        assert len(answer.tokens) == request.params.max_tokens
        logprobs = self.logits([*request.prompt, *answer.tokens], request.adapter).log_softmax(-1)
        first = len(request.prompt) - 1
        for place, (token, logprob) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
            row = logprobs[first + place]
            where = f"{request.id} ({request.adapter}), output {place}"
            assert token == int(row.argmax()), f"{where}: {token}, the judge says {int(row.argmax())}"
            assert abs(logprob - float(row[token])) < 1e-4, f"{where}: {logprob}, the judge says {float(row[token])}"
        for place, value in enumerate(answer.prompt_logprobs):
            if value is not None:
                assert abs(value - float(logprobs[place - 1][request.prompt[place]])) < 1e-4


def save_gptq(folder: Path, model: Path, judged: Path, bits: int, group_size: int, act_order: bool) -> None:
    """Write a model folder rounded to GPTQ's format to `folder`, and the same weights dequantized to `judged`. With
    act_order each linear has an input order of its own, so siblings cannot be fused."""
    checkpoint = Checkpoint(model)
    random = torch.Generator().manual_seed(bits)
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    spec = QuantSpec(bits, group_size, False, act_order)
    for name in checkpoint.dense:
        tensor = checkpoint.tensor(name)
        if not name.endswith("proj.weight"):
            packed[name] = plain[name] = tensor
            continue
        linear = _round(tensor.t().contiguous(), spec, random)
        packed |= to_tensors(name.removesuffix(".weight"), linear)
        plain[name] = dequantize(linear).t().contiguous()
    for target, tensors, extra in (
        (folder, packed, {"quantization_config": quantization_config(spec, 0.01, False)}),
        (judged, plain, {}),
    ):
        target.mkdir()
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps({**checkpoint.config, **extra}))


def _round(weight_KN: torch.Tensor, spec: QuantSpec, random: torch.Generator) -> QuantizedLinear:
    """Nearest codes in groups of inputs."""
    inputs = weight_KN.shape[0]
    size = inputs if spec.group_size == -1 else spec.group_size
    group_K = torch.arange(inputs) // size
    if spec.act_order:
        group_K = group_K[torch.randperm(inputs, generator=random)]
    top = 2**spec.bits - 1
    grouped = [weight_KN[group_K == group] for group in range(spec.groups(inputs))]
    low = torch.stack([g.amin(0) for g in grouped]).clamp(max=0)
    scales = ((torch.stack([g.amax(0) for g in grouped]).clamp(min=0) - low) / top).half()
    zeros = (-low / scales.float()).round().clamp(0, top)
    codes = (weight_KN / scales.float()[group_K] + zeros[group_K]).round().clamp(0, top)
    return from_codes(codes.to(torch.uint8), zeros.to(torch.uint8), scales, group_K, spec.group_size, spec.bits)
