"""A task's data as token sequences: some to make its Hessians from, some for the accuracy gate.

`examples` reads the file. Where a line has an answer and the tokenizer a chat template, they become a user's and an
assistant's turn, as the engine will see them. A seed decides which examples are taken, up to a budget of tokens, and
which are held out for the gate; none is in both.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlaid.files import hash_file
from inlaid.quant.examples import CalibrationError, Example, read_examples

SHOWN = 160  # characters of the example that a report shows


@dataclass(frozen=True)
class CalibrationSettings:
    """The choice of examples. `highlight` is the weight of a token of the answer, against 1 for the prompt's."""

    max_tokens: int = 262_144
    max_length: int = 2048
    held_out: float = 0.25
    highlight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.max_length < 2:
            raise CalibrationError("give a budget of at least one token and a length of at least two")
        if not 0 < self.held_out < 1:
            raise CalibrationError(f"held_out is {self.held_out}: a share between 0 and 1 must be left for the gate")
        if self.highlight <= 0:
            raise CalibrationError(f"highlight is {self.highlight}: it must be above 0")


@dataclass(frozen=True)
class Sequence:
    """Token ids; `answer` is where the completion begins (0 for a bare prompt: all of it counts as the answer)."""

    ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Calibration:
    """A task's sequences, the hash of the file that they came from, and a sentence on how it was read."""

    fitting: tuple[Sequence, ...]
    held_out: tuple[Sequence, ...]
    data_hash: str
    about: str


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of like length, padded on the right: causal attention never looks at the padding."""

    ids_BS: Tensor
    weight_BS: Tensor  # 0 where padded, else the weight of the token
    answer_BS: Tensor  # whether the token is to be predicted by the gate


def load_calibration(path: Path, tokenizer: Any, settings: CalibrationSettings) -> Calibration:
    """Draw a task's sequences from its file."""
    examples = read_examples(path)
    random.Random(settings.seed).shuffle(examples)
    num_held_out = max(1, round(len(examples) * settings.held_out))
    if num_held_out >= len(examples):
        raise CalibrationError(f"{path} holds {len(examples)} example(s); two or more are needed, one is held out")
    encoded = [encode(example, tokenizer, settings.max_length) for example in examples]
    for example, sequence in zip(examples, encoded, strict=True):
        if len(sequence.ids) - max(sequence.answer, 1) < 1:
            raise CalibrationError(f"{example.where} becomes fewer than two tokens with this model's tokenizer")
    held_out, rest = encoded[:num_held_out], encoded[num_held_out:]
    fitting: list[Sequence] = []
    budget = settings.max_tokens
    for sequence in rest:
        if fitting and len(sequence.ids) > budget:
            break
        fitting.append(sequence)
        budget -= len(sequence.ids)
    about = _about(examples, fitting, held_out, tokenizer)
    return Calibration(tuple(fitting), tuple(held_out), hash_file(path), about)


def _about(examples: list[Example], fitting: list[Sequence], held_out: list[Sequence], tokenizer: Any) -> str:
    """Say what was read: answers or not, the chat template or not, and one example as the model sees it."""
    answered = sum(bool(example.answer) for example in examples)
    way = "through the chat template" if getattr(tokenizer, "chat_template", None) else "without a chat template"
    how = (
        f"{answered} of {len(examples)} lines with an answer, {way}"
        if answered
        else f"{len(examples)} texts as they are"
    )
    shown = tokenizer.decode(fitting[0].ids)
    cut = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
    return f"{how}; {len(fitting)} to fit on, {len(held_out)} held out; the first is {cut!r}"


def encode(example: Example, tokenizer: Any, max_length: int) -> Sequence:
    """Return one example as tokens, cut at the end if it is too long."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if example.is_chat and not has_template:
        raise CalibrationError(
            f"{example.where} has `messages`, but the model has no chat template: give `prompt` and `completion`"
        )
    if not example.answer:
        return Sequence(tuple(tokenizer(example.prompt)["input_ids"][:max_length]), 0)
    if has_template:
        turns = [{"role": role, "content": text} for role, text in example.turns]
        heard = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        turns.append({"role": "assistant", "content": example.answer})
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        if not text.startswith(heard):
            raise CalibrationError(f"{example.where}: the chat template's answer does not go on from its prompt")
        heard_ids = tokenizer(heard, add_special_tokens=False)["input_ids"]
        said_ids = tokenizer(text[len(heard) :], add_special_tokens=False)["input_ids"]
    else:
        heard_ids = tokenizer(example.prompt)["input_ids"]
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        said_ids = tokenizer(example.answer, add_special_tokens=False)["input_ids"] + end
    if len(heard_ids) >= max_length:
        raise CalibrationError(
            f"{example.where}: its prompt of {len(heard_ids)} tokens leaves no room in --max-length "
            f"{max_length}; raise it"
        )
    return Sequence(tuple((heard_ids + said_ids)[:max_length]), len(heard_ids))


def batches(sequences: tuple[Sequence, ...], highlight: float = 1.0, max_tokens: int = 8192) -> list[Batch]:
    """Make padded batches, the same for the same sequences whatever else is quantized."""
    ordered = sorted(sequences, key=lambda sequence: (len(sequence.ids), sequence.ids))
    result: list[Batch] = []
    part: list[Sequence] = []
    for sequence in ordered:
        if part and len(sequence.ids) * (len(part) + 1) > max_tokens:
            result.append(padded(part, highlight))
            part = []
        part.append(sequence)
    return [*result, padded(part, highlight)] if part else result


def padded(part: list[Sequence], highlight: float = 1.0) -> Batch:
    """Make one batch of these sequences, in their order."""
    length = max(len(sequence.ids) for sequence in part)
    ids_BS = torch.zeros(len(part), length, dtype=torch.int64)
    weight_BS = torch.zeros(len(part), length)
    answer_BS = torch.zeros(len(part), length, dtype=torch.bool)
    for row, sequence in enumerate(part):
        end = len(sequence.ids)
        ids_BS[row, :end] = torch.tensor(sequence.ids)
        weight_BS[row, :end] = 1.0
        weight_BS[row, sequence.answer : end] = highlight
        answer_BS[row, max(sequence.answer, 1) : end] = True
    return Batch(ids_BS, weight_BS, answer_BS)
