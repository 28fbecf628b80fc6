"""Load a checkpoint of inlaid's with AutoGPTQ, and write the weights as it reads them and the logits that it gives.

    PYTHON load_checkpoint.py CHECKPOINT OUT

Runs in an environment of its own (README.md beside this file); nothing of inlaid is imported. On a CPU AutoGPTQ takes
its own torch code (`qlinear_cuda`, whose kernels need a GPU).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors import safe_open
from safetensors.torch import save_file


def load(folder: str) -> torch.nn.Module:
    """Load a quantized folder on the CPU, in single precision, with AutoGPTQ's own linears."""
    model = AutoGPTQForCausalLM.from_quantized(
        folder,
        device="cpu",
        torch_dtype=torch.float32,
        use_triton=False,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
        use_cuda_fp16=False,
    ).model
    embedding = tensor_of(Path(folder), "model.embed_tokens.weight")
    if model.config.tie_word_embeddings and embedding is not None:
        # accelerate, of that time, loads a table that the head shares, then ties it to the head that it did not load.
        model.get_input_embeddings().weight.data = embedding.float()
        model.tie_weights()
    return model


def tensor_of(folder: Path, name: str) -> torch.Tensor | None:
    """Return a tensor of a folder, or None if it has none of that name."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - it is no dict
                return tensors.get_tensor(name)
    return None


def answers(model: torch.nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return token ids, the logits for them, and each linear's weight [inputs, outputs] as it is multiplied by."""
    ids = torch.randint(3, model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(seed))
    found = {"ids": ids}
    with torch.inference_mode():
        found["logits"] = model(input_ids=ids).logits.float().contiguous()
        for name, module in model.named_modules():
            if hasattr(module, "qweight"):
                weight = module(torch.eye(module.infeatures))
                found[f"weight/{name}"] = weight - module.bias if module.bias is not None else weight
    return {name: tensor.contiguous() for name, tensor in found.items()}


def main() -> None:
    """Load, ask, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    save_file(answers(load(args.checkpoint)), args.out)


if __name__ == "__main__":
    main()
