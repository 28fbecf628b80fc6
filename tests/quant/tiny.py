"""Tiny random models, adapters and data for the quantizer's tests, in a few milliseconds each."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 96
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def write_base(folder: Path, family: str = "llama", seed: int = 0, tied: bool = False) -> Path:
    """Write a random model of a family, with a tokenizer of words."""
    torch.manual_seed(seed)
    extra = {"sliding_window": 8} if family == "mistral" else {}
    config = AutoConfig.for_model(family, **SHAPE, **extra, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():  # norms and biases that matter
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.save_pretrained(folder)
    return folder


def write_adapter(
    folder: Path, base: Path, seed: int, targets: tuple[str, ...] = ("q_proj", "down_proj"), **config
) -> Path:
    """Write a random PEFT adapter, with peft itself."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(targets)} | config
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    wrapped.save_pretrained(folder)
    return folder


def write_data(file: Path, seed: int, examples: int = 12, completions: bool = True) -> Path:
    """Write lines of random words."""
    generator = torch.Generator().manual_seed(seed)

    def text(words: int) -> str:
        return " ".join(f"w{int(i)}" for i in torch.randint(4, VOCABULARY, (words,), generator=generator))

    lines = []
    for i in range(examples):
        example = {"prompt": text(5 + i % 4)} | ({"completion": text(3 + i % 3)} if completions else {})
        lines.append(json.dumps(example))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return file
