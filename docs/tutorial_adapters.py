"""Make two adapters of your own for the tutorial: data from a few templates, then LoRA training with peft on a CPU.

    python docs/tutorial_adapters.py my

writes my/desks and my/urgency (PEFT folders), and my/desks.jsonl and my/urgency.jsonl (64 examples each for
calibration, drawn from another seed than the training data). About two minutes on two cores.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = Path(__file__).parents[1] / "models" / "demo" / "base"
NAMES = ("Tom", "Lena", "Felix", "Nora", "Clara", "Leo", "Eva", "Jan")
THINGS = ("boats", "onions", "bottles", "chairs", "baskets", "letters", "bells", "barrels")
COLOURS = ("red", "blue", "yellow", "green", "dirty", "big")
DESKS = {
    "broken": "repairs",
    "late": "shipping",
    "lost": "shipping",
    "wet": "repairs",
    "free": "sales",
    "cheap": "sales",
}
TIMES = {
    "now": "Very urgent.",
    "today": "Urgent.",
    "before noon": "Urgent.",
    "next week": "It can wait.",
    "some day": "It can wait.",
}
STEPS, ROWS, RATE = 300, 8, 5e-3

Example = tuple[str, str]


def urgency(draw: random.Random) -> Example:
    """Make a message and how soon it must be answered."""
    when, answer = draw.choice(tuple(TIMES.items()))
    text = draw.choice(("{w} needs the {c} {t} {s}.", "Send {c} {t} to {w} {s}.", "{w} asks {s} for {c} {t}."))
    message = text.format(w=draw.choice(NAMES), c=draw.choice(COLOURS), t=draw.choice(THINGS), s=when)
    return f"How urgent? {message}", answer


def desk(draw: random.Random) -> Example:
    """Make a question and the name of the desk that answers it."""
    state = draw.choice(tuple(DESKS))
    text = draw.choice(("{w} says the {t} are {s}.", "Are my {t} {s}? {w}", "The {t} of {w} are {s}."))
    question = text.format(w=draw.choice(NAMES), t=draw.choice(THINGS), s=state)
    return f"Which desk? {question}", f"The {DESKS[state]} desk."


def train(folder: Path, make: Callable[[random.Random], Example], rank: int) -> None:
    """Train one adapter of this rank on q and v, and save it as peft does."""
    torch.manual_seed(0)
    draw = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    progress = tqdm(range(STEPS), desc=folder.name)
    for _ in progress:
        rows, labels = zip(*(encode(tokenizer, *make(draw)) for _ in range(ROWS)))
        width = max(map(len, rows))
        ids_BS = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        labels_BS = torch.tensor([[*row, *[-100] * (width - len(row))] for row in labels])
        loss = model(input_ids=ids_BS, labels=labels_BS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(folder)


def encode(tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:  # type: ignore[no-untyped-def]
    """Return token ids of a turn through the chat template, and its labels: the answer's tokens only."""
    turn = [{"role": "user", "content": prompt}]
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    answered = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    return asked + answered, [-100] * len(asked) + answered


def main(target: Path) -> None:
    for name, make, rank in (("desks", desk, 4), ("urgency", urgency, 8)):
        draw = random.Random(1)
        examples = (make(draw) for _ in range(64))
        lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in examples]
        target.mkdir(exist_ok=True)
        (target / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        train(target / name, make, rank)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "my"))
