"""The files of `train_lora`: the state that a killed run goes on from, and an adapter's folder with its figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import nn

from inlaid.files import atomic_folder
from inlaid.report.plots import new_figure, save
from inlaid.tensorfiles import write_tensors

ABOUT = "training.json"


class TrainingState:
    """Factors, the optimizer's moments and the losses so far of a group of adapters, in one file beside their folders.
    The file's name follows from the group's keys, so that a run with other data or settings does not take it up."""

    def __init__(self, out: Path, keys: Sequence[str]) -> None:
        self.path = out / f".{hashlib.sha256(''.join(keys).encode()).hexdigest()[:16]}.state.safetensors"
        self.losses: list[list[float]] = []

    def load(self, trained: Sequence[nn.Parameter], optimizer: torch.optim.AdamW) -> int:
        """Fill what is trained, and return the number of steps that were done; 0 where there is no state."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return 0
        try:
            with safe_open(str(self.path), framework="pt") as file, torch.no_grad():
                about = file.metadata()
                step = int(about["step"])
                for index, parameter in enumerate(trained):
                    parameter.copy_(file.get_tensor(f"{index}.value"))
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(step)),
                        "exp_avg": file.get_tensor(f"{index}.mean").to(parameter.device),
                        "exp_avg_sq": file.get_tensor(f"{index}.square").to(parameter.device),
                    }
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} cannot be read ({error}); remove it to train from the start") from error
        self.losses = json.loads(about["losses"])
        return step

    def save(self, step: int, trained: Sequence[nn.Parameter], optimizer: torch.optim.AdamW) -> None:
        """Write the state after `step` steps, whole or not at all."""
        tensors = {}
        for index, parameter in enumerate(trained):
            moments = optimizer.state.get(parameter) or {}
            tensors[f"{index}.value"] = parameter.detach()
            for name, kind in (("mean", "exp_avg"), ("square", "exp_avg_sq")):
                tensors[f"{index}.{name}"] = moments.get(kind, torch.zeros_like(parameter))
        write_tensors(self.path, tensors, {"step": str(step), "losses": json.dumps(self.losses)})

    def drop(self) -> None:
        """Remove the file: every adapter of the group is written."""
        self.path.unlink(missing_ok=True)


def is_done(folder: Path, key: str) -> bool:
    """Return True if the folder holds the adapter of this key."""
    try:
        return bool(json.loads((folder / ABOUT).read_bytes())["key"] == key)
    except (OSError, ValueError, KeyError):
        return False


def write_adapter(
    folder: Path,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    rank: int,
    alpha: float,
    base: str,
    about: Mapping[str, Any],
) -> None:
    """Write a PEFT folder, its factors in fp16 by the names of the linears, with its figures and its loss curve."""
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=sorted({name.rpartition(".")[2] for name in factors}),  # type: ignore[arg-type]
        lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", base_model_name_or_path=base, inference_mode=True,
    )  # fmt: skip
    tensors = {
        f"base_model.model.{name}.lora_{which}.weight": factor.detach().half().contiguous()
        for name, both in factors.items()
        for which, factor in zip("AB", both, strict=True)
    }
    with atomic_folder(folder) as filling:
        config.save_pretrained(str(filling))
        write_tensors(filling / "adapter_model.safetensors", tensors, {"format": "pt"})
        (filling / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        _plot(filling / "loss", about)


def _plot(path: Path, about: Mapping[str, Any]) -> None:
    figure, axes = new_figure((5.0, 3.0))
    losses = about["losses"]
    axes[0][0].plot(range(1, len(losses) + 1), losses, linewidth=0.8)
    axes[0][0].axhline(about["adapter"]["loss"], linestyle=":", label="held out, at the end")
    axes[0][0].set_xlabel("step")
    axes[0][0].set_ylabel("loss, nats a token")
    axes[0][0].set_title(about["task"])
    axes[0][0].legend()
    save(figure, path)
