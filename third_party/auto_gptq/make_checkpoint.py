"""Quantize a 16-bit folder with AutoGPTQ on a CPU, and write what it then reads and answers.

    PYTHON make_checkpoint.py BASE OUT ANSWERS [--bits 4] [--group-size 32] [--desc-act]

AutoGPTQ quantizes on a GPU only, and asks torch whether there is one. Its code is the same on a CPU, so it is told yes,
and its first GPU is the CPU. Runs in an environment of its own (README.md beside this file).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import auto_gptq.modeling._base as base
import auto_gptq.quantization.gptq as solver
import torch
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from load_checkpoint import answers, load
from safetensors.torch import save_file


def main() -> None:
    """Quantize, save, load, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("out")
    parser.add_argument("answers", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--asymmetric", action="store_true")
    args = parser.parse_args()
    base.CUDA_0 = torch.device("cpu")
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda: None
    solver.time.sleep = lambda seconds: None  # it rests a second after each linear
    config = BaseQuantizeConfig(
        bits=args.bits, group_size=args.group_size, desc_act=args.desc_act, sym=not args.asymmetric
    )
    model = AutoGPTQForCausalLM.from_pretrained(args.base, config)
    ids = torch.randint(3, model.config.vocab_size, (16, 64), generator=torch.Generator().manual_seed(0))
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()], batch_size=4)
    model.save_quantized(args.out)
    torch.cuda.is_available = lambda: False
    save_file(answers(load(args.out)), args.answers)


if __name__ == "__main__":
    main()
