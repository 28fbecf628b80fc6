"""Quantize a tiny random Llama with GPTQModel: a folder that inlaid did not write, and the logits that it should give.

Runs in an environment of its own (README.md beside this file says how it is made); nothing of inlaid is imported.

    GPTQMODEL_CPU_WORKERS=2 PYTHON make_checkpoint.py --base EMPTY --out EMPTY [--bits 4] [--desc-act]

`--base` gets the 16-bit model and a tokenizer of words, `--out` the quantized folder and `expected.safetensors`: the
token ids of a few sequences, the logits of GPTQModel's own torch kernel for them, and the weights as it reads them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 96


def write_base(folder: Path) -> None:
    """Write a model of random weights, uneven norms and grouped heads: a reader that leaves anything out is noticed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).half()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.save_pretrained(folder)


def main() -> None:
    """Write the base, quantize it, and write the expected weights and logits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--desc-act", action="store_true")
    args = parser.parse_args()
    write_base(args.base)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (32, 64), generator=generator)
    config = QuantizeConfig(bits=args.bits, group_size=32, desc_act=args.desc_act, device="cpu")
    model = GPTQModel.load(str(args.base), config, backend=BACKEND.TORCH)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()], batch_size=8)
    model.save(str(args.out))
    read = GPTQModel.load(str(args.out), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    asked = ids[:4, :24].contiguous()
    with torch.inference_mode():
        logits = read.model(input_ids=asked).logits.float()
    weights = {
        f"weight/{name}": module.dequantize_weight().contiguous()
        for name, module in read.model.named_modules()
        if hasattr(module, "dequantize_weight")
    }
    save_file({"ids": asked, "logits": logits.contiguous(), **weights}, args.out / "expected.safetensors")


if __name__ == "__main__":
    main()
