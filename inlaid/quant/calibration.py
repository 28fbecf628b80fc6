"""A task's data as token sequences: some to make its Hessians from, some for the accuracy gate.

A file is JSONL; each line has a `prompt` and may have a `completion`. Where both are there and the tokenizer has a chat
template, they become a user's and an assistant's turn, as the engine will see them. A seed decides which examples are
taken, up to a budget of tokens, and which are held out for the gate; none is in both.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlaid.files import hash_file


class CalibrationError(ValueError):
    """The calibration data cannot be used; the message says where and why."""


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
    """A task's sequences, and the hash of the file that they came from."""

    fitting: tuple[Sequence, ...]
    held_out: tuple[Sequence, ...]
    data_hash: str


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of like length, padded on the right: causal attention never looks at the padding."""

    ids_BS: Tensor
    weight_BS: Tensor  # 0 where padded, else the weight of the token
    answer_BS: Tensor  # whether the token is to be predicted by the gate


def read_examples(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file, and check each."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as text: {error}") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(example, dict) or not isinstance(example.get("prompt"), str) or not example["prompt"]:
            raise CalibrationError(f"{path}, line {number} has no text in a field 'prompt'")
        if not isinstance(example.get("completion", ""), str):
            raise CalibrationError(f"{path}, line {number}: its 'completion' is not text")
        examples.append(example)
    if not examples:
        raise CalibrationError(f"{path} holds no examples; give one JSON object with a 'prompt' per line")
    return examples


def load_calibration(path: Path, tokenizer: Any, settings: CalibrationSettings) -> Calibration:
    """Draw a task's sequences from its file."""
    examples = read_examples(path)
    random.Random(settings.seed).shuffle(examples)
    num_held_out = max(1, round(len(examples) * settings.held_out))
    if num_held_out >= len(examples):
        raise CalibrationError(f"{path} holds {len(examples)} example(s); two or more are needed, one is held out")
    encoded = [encode(example, tokenizer, settings.max_length) for example in examples]
    if min(len(sequence.ids) - max(sequence.answer, 1) for sequence in encoded) < 1:
        raise CalibrationError(f"{path}: an example becomes fewer than two tokens with this model's tokenizer")
    held_out, rest = encoded[:num_held_out], encoded[num_held_out:]
    fitting: list[Sequence] = []
    budget = settings.max_tokens
    for sequence in rest:
        if fitting and len(sequence.ids) > budget:
            break
        fitting.append(sequence)
        budget -= len(sequence.ids)
    return Calibration(tuple(fitting), tuple(held_out), hash_file(path))


def encode(example: dict[str, Any], tokenizer: Any, max_length: int) -> Sequence:
    """One example as tokens, cut at the end if it is too long."""
    prompt, completion = example["prompt"], example.get("completion", "")
    if not completion:
        return Sequence(tuple(tokenizer(prompt)["input_ids"][:max_length]), 0)
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}]
        heard = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        turns.append({"role": "assistant", "content": completion})
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        if not text.startswith(heard):
            raise CalibrationError("the chat template's answer does not continue its generation prompt")
        heard_ids = tokenizer(heard, add_special_tokens=False)["input_ids"]
        said_ids = tokenizer(text[len(heard) :], add_special_tokens=False)["input_ids"]
    else:
        heard_ids = tokenizer(prompt)["input_ids"]
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        said_ids = tokenizer(completion, add_special_tokens=False)["input_ids"] + end
    if len(heard_ids) >= max_length:
        raise CalibrationError(f"a prompt has {len(heard_ids)} tokens, which leaves no room in {max_length}; raise it")
    return Sequence(tuple((heard_ids + said_ids)[:max_length]), len(heard_ids))


def batches(sequences: tuple[Sequence, ...], highlight: float = 1.0, max_tokens: int = 8192) -> list[Batch]:
    """Make padded batches, the same for the same sequences whatever else is quantized."""
    ordered = sorted(sequences, key=lambda sequence: (len(sequence.ids), sequence.ids))
    result: list[Batch] = []
    part: list[Sequence] = []
    for sequence in ordered:
        if part and len(sequence.ids) * (len(part) + 1) > max_tokens:
            result.append(_pad(part, highlight))
            part = []
        part.append(sequence)
    return [*result, _pad(part, highlight)] if part else result


def _pad(part: list[Sequence], highlight: float) -> Batch:
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
