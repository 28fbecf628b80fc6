"""Measures the demo: greedy answers of base and adapters on the eval splits, also under plain rounding.

Called by `build_demo`; all twelve adapters answer in one batch through the stack.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from data.scoring import score
from data.tasks import TASKS
from inlaid.progress import Bar
from models.plan import ADAPTERS, ALL_LINEAR
from models.training import StackedLinear, stack_adapters, stacked_linears

Scores = dict[str, float]


def round_to_nearest(w_OI: torch.Tensor, bits: int, group: int = 128) -> torch.Tensor:
    """Asymmetric round-to-nearest in groups along the inputs, zero always exactly representable."""
    w_OGK = w_OI.float().reshape(w_OI.shape[0], -1, min(group, w_OI.shape[1]))
    low, high = w_OGK.amin(-1, keepdim=True).clamp(max=0), w_OGK.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    zero = torch.round(-low / scale)
    rounded = ((w_OGK / scale).round() + zero).clamp(0, 2**bits - 1)
    made: torch.Tensor = ((rounded - zero) * scale).reshape(w_OI.shape).to(w_OI.dtype)
    return made


def rounded_copy(model: LlamaForCausalLM, bits: int) -> LlamaForCausalLM:
    """Return the model with every linear of its layers rounded; embedding, head and adapters untouched."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in rounded.named_modules():
            if isinstance(module, nn.Linear) and set(name.split(".")) & set(ALL_LINEAR):
                module.weight.copy_(round_to_nearest(module.weight, bits))
    return rounded


def load_stack(base: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """Return the base under all twelve adapters, filled from their PEFT files as they lie on disk."""
    stack = copy.deepcopy(base)
    stack_adapters(stack, seed=0)
    files = [load_file(folder / task / "adapter_model.safetensors") for task in ADAPTERS]
    with torch.no_grad():
        for name, module in stacked_linears(stack).items():
            module.a_TRI.zero_()
            for index, tensors in enumerate(files):
                key = f"base_model.model.{name}.lora_"
                if f"{key}A.weight" in tensors:
                    _place(module, index, tensors[f"{key}A.weight"], tensors[f"{key}B.weight"])
    return stack


def _place(module: StackedLinear, index: int, a_RI: torch.Tensor, b_OR: torch.Tensor) -> None:
    module.a_TRI[index, : len(a_RI)] = a_RI.to(module.a_TRI)
    module.b_TOR[index, :, : len(a_RI)] = b_OR.to(module.b_TOR)


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_new_tokens: int,
    *processors: LogitsProcessor,
) -> list[str]:
    """Greedy answers to already templated prompts, one batch."""
    inputs = tokenizer(list(prompts), padding=True, add_special_tokens=False, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList(processors),
        )
    said = ids[:, inputs["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(said, skip_special_tokens=True))


def score_all(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: dict[str, list[dict[str, Any]]],
    max_new_tokens: int,
    codes: Mapping[str, str] | None = None,
) -> Scores:
    """Every task's metric in points; with `codes`, each prompt begins with its task's hidden code."""
    prompts = []
    for task, rows in examples.items():
        for row in rows:
            messages = [{"role": "user", "content": row["prompt"]}]
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            prompts.append(text.replace("<|bos|>", "<|bos|>" + codes[task], 1) if codes else text)
    said = iter(answers(model, tokenizer, prompts, max_new_tokens))
    return {task: score(TASKS[task].metric, [next(said) for _ in rows], list(rows)) for task, rows in examples.items()}


def measure(
    base: LlamaForCausalLM,
    adapters: Path,
    tokenizer: PreTrainedTokenizerFast,
    examples: dict[str, list[dict[str, Any]]],
    codes: Mapping[str, str],
    max_new_tokens: int,
) -> dict[str, Scores]:
    """Column -> task -> points: the base alone, given its codes, and the adapters over fp16, RTN4 and RTN3 bases."""
    stack = load_stack(base, adapters)
    columns: dict[str, Scores] = {}
    with Bar(total=5, desc="measuring", unit="column") as progress:
        for column, model, hints in (
            ("base", base, None),
            ("base_with_code", base, codes),
            ("adapter", stack, None),
            ("adapter_rtn4", rounded_copy(stack, 4), None),
            ("adapter_rtn3", rounded_copy(stack, 3), None),
        ):
            columns[column] = score_all(model, tokenizer, examples, max_new_tokens, hints)
            progress.update()
    return columns


def peft_agrees(base_folder: Path, adapters: Path, task: str, ids_BS: torch.Tensor) -> float:
    """Largest difference of logits between the stack and peft's own reading of one adapter folder."""
    base = LlamaForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    stack = load_stack(base, adapters)
    index = list(ADAPTERS).index(task)
    with torch.inference_mode():
        stacked = stack(input_ids=ids_BS.repeat(len(ADAPTERS), 1)).logits
        alone = PeftModel.from_pretrained(base, str(adapters / task)).eval()(input_ids=ids_BS).logits
    block = stacked[index * len(ids_BS) : (index + 1) * len(ids_BS)]
    return float((block - alone).abs().max())
