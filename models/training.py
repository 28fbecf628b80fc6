"""Trains the demo: the base model, then all twelve adapters at once as a stack of batched low-rank products.

Called by `build_demo` only. The adapters leave as PEFT folders, written by peft itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from inlaid.progress import Bar
from models.corpus import IGNORED
from models.plan import ADAPTERS, ALL_LINEAR, BuildPlan

# Shapes in names: T tasks, B rows, S positions, R rank, I and O a linear's inputs and outputs.


def new_model(plan: BuildPlan, token_ids: dict[str, int]) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=plan.vocabulary,
        hidden_size=plan.hidden,
        intermediate_size=plan.mlp,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads,
        head_dim=64,
        max_position_embeddings=plan.positions,
        tie_word_embeddings=True,
        bos_token_id=token_ids["<|bos|>"],
        eos_token_id=token_ids["<|end|>"],
        pad_token_id=token_ids["<|pad|>"],
    )
    return LlamaForCausalLM(config)


class StackedLinear(nn.Module):
    """A frozen linear under one adapter a task: row block t of the batch passes through adapter t.

    y = W x + scale_t B_t (A_t x). Adapters are padded to the largest rank with zeros in A and in B, whose
    gradients are exactly zero, so padding stays zero; a task that does not target this module is all padding.
    `only`: all rows pass through this adapter, or through none (-1).
    """

    def __init__(
        self, base: nn.Linear, ranks: Sequence[int], scales: Sequence[float], generators: Sequence[torch.Generator]
    ) -> None:
        super().__init__()
        self.base = base
        self.only: int | None = None
        a_TRI = torch.zeros(len(ranks), max(ranks), base.in_features)
        for rank, a_RI, generator in zip(ranks, a_TRI, generators, strict=True):
            bound = 1 / math.sqrt(base.in_features)
            a_RI[:rank].uniform_(-bound, bound, generator=generator)
        self.a_TRI = nn.Parameter(a_TRI)
        self.b_TOR = nn.Parameter(torch.zeros(len(ranks), base.out_features, max(ranks)))
        self.scale_T: torch.Tensor
        self.register_buffer("scale_T", torch.tensor(list(scales)))

    def forward(self, x_BSI: torch.Tensor) -> torch.Tensor:
        y_BSO: torch.Tensor = self.base(x_BSI)
        if self.only is not None:
            at = self.only
            return y_BSO if at < 0 else y_BSO + (x_BSI @ self.a_TRI[at].T) @ self.b_TOR[at].T * self.scale_T[at]
        x_TNI = x_BSI.reshape(len(self.scale_T), -1, x_BSI.shape[-1])
        delta_TNO = torch.bmm(torch.bmm(x_TNI, self.a_TRI.transpose(1, 2)), self.b_TOR.transpose(1, 2))
        return y_BSO + (delta_TNO * self.scale_T[:, None, None]).view_as(y_BSO)


def stack_adapters(model: LlamaForCausalLM, seed: int) -> list[nn.Parameter]:
    """Put the demo's adapters, new ones, over every linear of the layers; returns what is to be trained."""
    plans = list(ADAPTERS.values())
    generators = [torch.Generator().manual_seed(seed)] * len(plans)  # one, which all draw from in turn
    return stack(model, lambda module: [(plan.rank_of(module), plan.scale_of(module)) for plan in plans], generators)


def stack(
    model: Any, shapes_of: Callable[[str], Sequence[tuple[int, float]]], generators: Sequence[torch.Generator]
) -> list[nn.Parameter]:
    """Freeze the model and put a StackedLinear over every linear of its layers for which `shapes_of` its name gives
    ranks above 0, with scales, one for each task. Return what is to be trained."""
    model.requires_grad_(False)
    trained: list[nn.Parameter] = []
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for module in [name for name, _ in owner.named_children() if name in ALL_LINEAR]:
                ranks, scales = zip(*shapes_of(module), strict=True)
                if not any(ranks):
                    continue
                stacked = StackedLinear(getattr(owner, module), ranks, scales, generators).to(model.device)
                setattr(owner, module, stacked)
                trained += [stacked.a_TRI, stacked.b_TOR]
    return trained


def stacked_linears(model: nn.Module) -> dict[str, StackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, StackedLinear)}


def _loss(model: nn.Module, ids_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    logits_BSV = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS[:, 1:].flatten(), ignore_index=IGNORED)


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to a fiftieth of the peak."""
    warmup = max(1, num_steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: LlamaForCausalLM,
    trained: list[nn.Parameter],
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    num_steps: int,
    peak_rate: float,
    title: str,
) -> float:
    """AdamW without weight decay, bf16 arithmetic over fp32 weights; returns the last loss."""
    device = model.device
    model.train()
    optimizer = torch.optim.AdamW(
        trained, lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
    )
    loss_of: Callable[..., torch.Tensor] = torch.compile(_loss) if device.type == "cuda" else _loss
    progress = Bar(range(num_steps), desc=title, unit="step", mininterval=5)
    last = math.nan
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, peak_rate)
        ids_BS, labels_BS = next(batches)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(model, ids_BS, labels_BS)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0, foreach=device.type == "cuda")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0 or step == num_steps - 1:
            last = loss.item()
            progress.set_postfix(loss=f"{last:.4f}")
    model.eval()
    return last


def base_batches(
    ids_RS: torch.Tensor, labels_RS: torch.Tensor, plan: BuildPlan, seed: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows in an order shuffled anew each epoch."""
    generator = torch.Generator().manual_seed(seed)
    ids_RS, labels_RS = ids_RS.to(device), labels_RS.to(device)
    while True:
        order = torch.randperm(len(ids_RS), generator=generator).to(device)
        for start in range(0, len(order) - plan.base_batch + 1, plan.base_batch):
            rows = order[start : start + plan.base_batch]
            yield ids_RS[rows].long(), labels_RS[rows].long()


def adapter_batches(
    ids_TNS: torch.Tensor, labels_TNS: torch.Tensor, plan: BuildPlan, seed: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Draw the same number of rows from every task, task after task, as StackedLinear wants them."""
    generator = torch.Generator().manual_seed(seed)
    ids_TNS, labels_TNS = ids_TNS.to(device), labels_TNS.to(device)
    while True:
        order = torch.randperm(ids_TNS.shape[1], generator=generator).to(device)
        for start in range(0, len(order) - plan.adapter_batch + 1, plan.adapter_batch):
            rows = order[start : start + plan.adapter_batch]
            yield ids_TNS[:, rows].flatten(0, 1).long(), labels_TNS[:, rows].flatten(0, 1).long()


def save_base(model: LlamaForCausalLM, folder: Path) -> None:
    """fp16 safetensors, and a generation config that answers greedily and stops at the end-of-turn token."""
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    model.half().save_pretrained(folder, safe_serialization=True)
    model.float()


def save_adapters(stack: LlamaForCausalLM, base_folder: Path, folder: Path) -> None:
    """One PEFT folder a task, fp16, written by peft from the stack's slices."""
    stacked = stacked_linears(stack)
    for index, (task, plan) in enumerate(Bar(ADAPTERS.items(), desc="writing adapters", unit="adapter")):
        config = LoraConfig(
            r=plan.rank,
            lora_alpha=plan.alpha,
            target_modules=sorted(plan.targets),
            use_rslora=plan.use_rslora,
            rank_pattern=dict(plan.rank_pattern),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path="models/demo/base",
        )
        base = LlamaForCausalLM.from_pretrained(base_folder, dtype=torch.float16)
        wrapped: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, module in wrapped.base_model.model.named_modules():
                if name in stacked and hasattr(module, "lora_A"):
                    _fill(module, stacked[name], index, plan.rank_of(name.rpartition(".")[2]))
        wrapped.peft_config["default"].base_model_name_or_path = "models/demo/base"
        wrapped.save_pretrained(folder / task, safe_serialization=True, save_embedding_layers=False)
        (folder / task / "README.md").unlink(missing_ok=True)


def _fill(module: Any, source: StackedLinear, index: int, rank: int) -> None:
    a_RI, b_OR = module.lora_A["default"].weight, module.lora_B["default"].weight
    assert abs(module.scaling["default"] - source.scale_T[index].item()) < 1e-6
    a_RI.copy_(source.a_TRI[index, :rank])
    b_OR.copy_(source.b_TOR[index, :, :rank])
