"""Load a checkpoint of inlaid's with GPTQModel, and write the logits that its own torch kernel gives.

    GPTQMODEL_CPU_WORKERS=2 PYTHON load_checkpoint.py CHECKPOINT OUT

OUT gets the token ids of a few sequences and the logits for them. Runs in an environment of its own (README.md beside
this file); nothing of inlaid is imported.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file


def main() -> None:
    """Load, ask, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    read = GPTQModel.load(args.checkpoint, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    ids = torch.randint(3, read.model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = read.model(input_ids=ids).logits.float()
    save_file({"ids": ids, "logits": logits.contiguous()}, args.out)


if __name__ == "__main__":
    main()
