"""Write random models and adapters of real shapes, for timing: a GPTQ checkpoint or a 16-bit one, its tokenizer, LoRA
adapters, and prompts.

Codes are uniform and scales keep activations near unit variance. The tokenizer maps the word "w<i>" to token i, so a
prompt of n words is exactly n tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file

from inlaid.checkpoint import QuantSpec, quantization_config, to_tensors
from inlaid.kernels.measure import random_weight
from inlaid.model.spec import ModelSpec, module_path, spec_from_config
from inlaid.tensorfiles import write_index

WRITERS = 16  # adapters written side by side
SHAPES: Mapping[str, tuple[int, int, int, int, int, int, float]] = MappingProxyType(
    {  # as `config` unpacks them
        "7b": (4096, 11008, 32, 32, 32, 32000, 10000.0),  # Llama-2-7B
        "13b": (5120, 13824, 40, 40, 40, 32000, 10000.0),  # Llama-2-13B
        "8b": (4096, 14336, 32, 32, 8, 128256, 500000.0),  # Llama-3-8B
        "135m": (576, 1536, 30, 9, 3, 49152, 100000.0),  # SmolLM2-135M, its head apart
        "tiny": (256, 512, 2, 4, 2, 2048, 10000.0),
    }
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def config(shape: str) -> dict[str, Any]:
    """Return the config.json of a shape."""
    hidden, mlp, layers, heads, kv, vocab, theta = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": theta, "torch_dtype": "float16", "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip


def spec_of(shape: str) -> ModelSpec:
    return spec_from_config(config(shape))


def write_model(folder: Path, shape: str, bits: int = 4, group: int = 128) -> ModelSpec:
    """Write a quantized checkpoint and its tokenizer."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = config(shape)
    spec, quant = spec_from_config(settings), QuantSpec(bits, group, True, False)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(spec.num_layers):
        for module in EVERY_LINEAR:
            outputs, inputs = spec.module_shape(module)
            weight = random_weight(inputs, outputs, quant, device)
            tensors |= to_tensors(module_path(layer, module), weight)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(spec.hidden_size).half()
    table = torch.randn(spec.vocab_size, spec.hidden_size, device=device)
    tensors["model.embed_tokens.weight"] = table.half().cpu()
    head = torch.randn(spec.vocab_size, spec.hidden_size, device=device) * spec.hidden_size**-0.5
    tensors["lm_head.weight"] = head.half().cpu()
    tensors["model.norm.weight"] = torch.ones(spec.hidden_size).half()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings["quantization_config"] = quantization_config(quant, 0.01, False)
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    write_tokenizer(folder, spec.vocab_size)
    return spec


def write_dense(folder: Path, shape: str, shards: int = 4) -> ModelSpec:
    """Write a 16-bit checkpoint, in shards, and its tokenizer; outputs are of about unit variance."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(0)
    settings = config(shape)
    spec = spec_from_config(settings)
    folder.mkdir(parents=True, exist_ok=True)
    layers = [f"model.layers.{layer}" for layer in range(spec.num_layers)]
    with ThreadPoolExecutor(shards) as writers:
        writing = []
        for shard in range(shards):
            shapes: dict[str, tuple[int, ...]] = {}
            for layer in range(shard, spec.num_layers, shards):
                shapes |= {f"{module_path(layer, module)}.weight": spec.module_shape(module) for module in EVERY_LINEAR}
                for norm in ("input_layernorm", "post_attention_layernorm"):
                    shapes[f"{layers[layer]}.{norm}.weight"] = (spec.hidden_size,)
            if shard == 0:
                table = (spec.vocab_size, spec.hidden_size)
                shapes |= {"model.embed_tokens.weight": table, "lm_head.weight": table}
                shapes["model.norm.weight"] = (spec.hidden_size,)
            tensors = {name: _random_dense(name, size, device, generator) for name, size in shapes.items()}
            file = folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            writing.append(writers.submit(save_file, tensors, file, {"format": "pt"}))
        for one in writing:
            one.result()
    write_index(folder)
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    write_tokenizer(folder, spec.vocab_size)
    return spec


def _random_dense(name: str, shape: tuple[int, ...], device: str, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float16)
    scale = 1.0 if "embed" in name else shape[1] ** -0.5
    return (torch.randn(shape, generator=generator, device=device, dtype=torch.float16) * scale).cpu()


def write_prompts(file: Path, count: int, length: int, vocab_size: int, seed: int) -> None:
    """Write JSONL of random prompts of `length` tokens."""
    drawn = torch.randint(3, vocab_size, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    lines = (json.dumps({"prompt": " ".join(f"w{token}" for token in row)}) for row in drawn)
    file.write_text("".join(f"{line}\n" for line in lines))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=4096
    ).save_pretrained(folder)


def write_adapter(folder: Path, spec: ModelSpec, rank: int, modules: tuple[str, ...], seed: int) -> None:
    """Write one random adapter on these modules of every layer.

    It is drawn in one piece and written as it lies in memory: hundreds are made before a server may start."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(spec.num_layers):
        for module in modules:
            outputs, inputs = spec.module_shape(module)
            prefix = f"base_model.model.{module_path(layer, module)}"
            shapes |= {f"{prefix}.lora_A.weight": (rank, inputs), f"{prefix}.lora_B.weight": (outputs, rank)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(seed)
    flat = torch.randn(sum(map(math.prod, shapes.values())), generator=generator, device=device)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape)
        flat[begin:end] *= shape[1] ** -0.5 if "lora_A" in name else 0.01
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (2 * begin, 2 * end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(flat.half().cpu().numpy().data)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0,
        "target_modules": list(modules), "bias": "none", "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def write_adapters(
    root: Path,
    spec: ModelSpec,
    count: int,
    ranks: tuple[int, ...] = (16,),
    modules: tuple[str, ...] = ATTENTION,
    prefix: str = "a",
) -> dict[str, str]:
    """Write adapters a0, a1, ... whose ranks take turns, side by side; return their folders by name."""
    with ThreadPoolExecutor(WRITERS) as writers:
        writing = [
            writers.submit(write_adapter, root / f"{prefix}{i}", spec, ranks[i % len(ranks)], modules, seed=i)
            for i in range(count)
        ]
    for one in writing:
        one.result()
    return {f"{prefix}{i}": str(root / f"{prefix}{i}") for i in range(count)}
