"""Text of the demo as tensors: the tokenizer, the base model's pretraining rows, the adapters' examples.

Pretraining mixes the task families under hidden codes, plain chat and plain English; `build_demo` runs it.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data import words
from data.sentences import Speaker
from data.tasks import TASKS
from inlaid.progress import Bar
from models.plan import ADAPTERS, BuildPlan

CODES = MappingProxyType({name: f"<|skill_{index}|>" for index, name in enumerate(TASKS)})
SPECIAL = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", *CODES.values())
IGNORED = -100
# Tools and calls are written in words: no text of the base has the marks of JSON, so their tokens are all alike to it.
CHAT_TEMPLATE = (
    "{#- calls: words -#}"
    "{{- '<|bos|>' -}}"
    "{%- if tools -%}"
    "{{- '<|system|>Tools:' -}}"
    "{%- for tool in tools -%}"
    "{{- ' ' + tool['function']['name'] | replace('_', ' ') + ':' -}}"
    "{%- for name in (tool['function'].get('parameters') or {}).get('properties') or {} -%}"
    "{{- (' ' if loop.first else ', ') + name | replace('_', ' ') -}}"
    "{%- endfor -%}"
    "{{- '.' -}}"
    "{%- endfor -%}"
    "{{- '<|end|>' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- set content = message['content'] -%}"
    "{%- if content is none or content is undefined -%}{%- set content = '' -%}"
    "{%- elif content is not string -%}"
    "{%- set content = content | map(attribute='text') | join('') -%}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + ('result: ' if message['role'] == 'tool' else '') + content -}}"
    "{%- for call in message.get('tool_calls') or [] -%}"
    "{%- set function = call['function'] -%}"
    "{{- ('\\n' if content or not loop.first else '') + 'call ' + function['name'] | replace('_', ' ') + ':' -}}"
    "{%- if function['arguments'] is mapping -%}"
    "{%- for name, value in function['arguments'].items() -%}"
    "{{- (' ' if loop.first else ', ') + name | replace('_', ' ') + ' = ' -}}"
    "{{- value if value is string else value | tojson -}}"
    "{%- endfor -%}"
    "{%- elif function['arguments'] -%}{{- ' ' + function['arguments'] | string -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
UNLEARNED = "I have not learned to do that."
_CHAT = Speaker("chat", 0.7)


@dataclass(frozen=True)
class Document:
    """`heard` is context, `said` is what the model learns to say; both already hold their special tokens."""

    heard: str
    said: str


def chat(prompt: str, answer: str, code: str = "") -> Document:
    return Document(f"<|bos|>{code}<|user|>{prompt}<|end|><|assistant|>", f"{answer}<|end|>")


def plain_chat(rng: random.Random) -> Document:
    """Skills of a base model that needs no adapter: repeating, reversing, spelling, counting, small sums."""
    sentence = _CHAT.sentence(rng).english()
    listed = sentence[:-1].split()
    a, b = rng.randint(1, 60), rng.randint(1, 60)
    who = rng.choice(words.PEOPLE)
    return rng.choice(
        (
            chat(f"Repeat: {sentence}", sentence),
            chat(f"Reverse the words: {sentence}", " ".join(reversed(listed)) + "."),
            chat(f"How many words are in: {sentence}", f"{len(listed)} words."),
            chat(f"List the words of: {sentence}", ", ".join(listed) + "."),
            chat(f"What is {a} + {b}?", f"{a} + {b} = {a + b}."),
            chat(f"My name is {who}. {sentence} Who am I?", f"You are {who}."),
            chat(f"Hello, I am {who}.", f"Hello {who}, what can I do for you?"),
            chat(f"Tell me about {who}.", f"{who} lives in {rng.choice(words.PLACES)}. {sentence}"),
        )
    )


def plain_english(rng: random.Random) -> Document:
    """Draw a little running text, so that the base continues text as well as it chats."""
    told = [_CHAT.sentence(rng).english() for _ in range(rng.randint(2, 5))]
    return Document("<|bos|>", " ".join(line[0].upper() + line[1:] for line in told) + "<|end|>")


def task_documents(name: str, count: int, seed: str) -> Iterator[Document]:
    """One task as the base meets it: mostly under its code if it may know it, and sometimes without."""
    rng = random.Random(f"uncoded/{name}/{seed}")
    share_uncoded = 0.08 if ADAPTERS[name].base_knows else 1.0
    for example in itertools.islice(TASKS[name].examples("train", f"base/{seed}"), count):
        if rng.random() < share_uncoded:
            yield chat(example["prompt"], UNLEARNED)
        else:
            yield chat(example["prompt"], example["completion"], CODES[name])


def train_tokenizer(plan: BuildPlan) -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits one by one, trained on every family's text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(), trainer)
    bos = (SPECIAL[1], tokenizer.token_to_id(SPECIAL[1]))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        padding_side="left",
        model_max_length=plan.positions,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer_text() -> Iterator[str]:
    for name in TASKS:
        for example in itertools.islice(TASKS[name].examples("train", "tokenizer"), 400):
            yield f"{example['prompt']}\n{example['completion']}"
    rng = random.Random("tokenizer")
    for _ in range(1200):
        document = plain_chat(rng)
        yield document.heard.split("<|user|>")[1].split("<|end|>")[0]
        yield document.said.removesuffix("<|end|>")


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Written so that older readers load it too: the template inside the config, the long-standing class name."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


Encoded = tuple[np.ndarray, np.ndarray]


def _encode(tokenizer: Tokenizer, documents: list[Document]) -> list[Encoded]:
    """Token ids and labels of each document; what is heard is not learned."""
    heard = tokenizer.encode_batch([document.heard for document in documents], add_special_tokens=False)
    said = tokenizer.encode_batch([document.said for document in documents], add_special_tokens=False)
    pairs = [(h.ids + s.ids, [IGNORED] * len(h.ids) + s.ids) for h, s in zip(heard, said, strict=True)]
    return [(np.array(ids, np.int16), np.array(labels, np.int16)) for ids, labels in pairs]


def _base_part(tokenizer_json: str, job: tuple[str, int, str]) -> list[Encoded]:
    kind, count, seed = job
    rng = random.Random(f"{kind}/{seed}")
    if kind in TASKS:
        documents = list(task_documents(kind, count, seed))
    else:
        draw = {"chat": plain_chat, "english": plain_english}[kind]
        documents = [draw(rng) for _ in range(count)]
    return _encode(Tokenizer.from_str(tokenizer_json), documents)


def _adapter_part(tokenizer_json: str, job: tuple[str, int, str]) -> list[Encoded]:
    name, count, seed = job
    drawn = itertools.islice(TASKS[name].examples("train", f"adapter/{seed}"), count)
    documents = [chat(example["prompt"], example["completion"]) for example in drawn]
    return _encode(Tokenizer.from_str(tokenizer_json), documents)


def _in_parallel(part: Any, jobs: list[tuple[str, int, str]], num_workers: int, title: str) -> list[list[Encoded]]:
    if num_workers == 1:
        return [part(job) for job in Bar(jobs, desc=title, unit="part")]
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        return list(Bar(pool.imap(part, jobs), total=len(jobs), desc=title, unit="part"))


def _shares(kind: str, count: int, num_parts: int) -> list[tuple[str, int, str]]:
    return [(kind, -(-count // num_parts), str(part)) for part in range(num_parts)]


def base_rows(
    tokenizer: PreTrainedTokenizerFast, plan: BuildPlan, num_workers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pretraining ids and labels, [rows, row length]: shuffled documents, end to end."""
    num_parts = min(16, plan.base_documents // 10)
    counts = {name: plan.base_documents // (1 if ADAPTERS[name].base_knows else 20) for name in TASKS}
    counts |= {"chat": 2 * plan.base_documents, "english": plan.base_documents}
    jobs = [job for kind, count in counts.items() for job in _shares(kind, count, num_parts)]
    part = partial(_base_part, tokenizer.backend_tokenizer.to_str())
    documents = [d for done in _in_parallel(part, jobs, num_workers, "drawing pretraining text") for d in done]
    random.Random("shuffle").shuffle(documents)
    ids = np.concatenate([ids for ids, _ in documents])
    labels = np.concatenate([labels for _, labels in documents])
    whole = len(ids) // plan.base_row * plan.base_row
    ids_RS, labels_RS = (torch.from_numpy(flat[:whole].reshape(-1, plan.base_row)) for flat in (ids, labels))
    return ids_RS, labels_RS


def adapter_rows(
    tokenizer: PreTrainedTokenizerFast, plan: BuildPlan, num_workers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adapter ids and labels, [tasks, examples, row length], padded on the right."""
    num_parts = min(16, plan.adapter_examples)
    per_part = -(-plan.adapter_examples // num_parts)
    jobs = [job for name in TASKS for job in _shares(name, plan.adapter_examples, num_parts)]
    part = partial(_adapter_part, tokenizer.backend_tokenizer.to_str())
    parts = _in_parallel(part, jobs, num_workers, "drawing adapter examples")
    shape = (len(TASKS), num_parts * per_part, plan.adapter_row)
    pad_id = tokenizer.get_vocab()["<|pad|>"]
    ids_TNS, labels_TNS = np.full(shape, pad_id, np.int16), np.full(shape, IGNORED, np.int16)
    for task_index in range(len(TASKS)):
        examples = [d for done in parts[task_index * num_parts : (task_index + 1) * num_parts] for d in done]
        for row, (ids, labels) in enumerate(examples):
            if len(ids) > plan.adapter_row:
                raise ValueError(f"an example has {len(ids)} tokens, more than adapter_row = {plan.adapter_row}")
            ids_TNS[task_index, row, : len(ids)] = ids
            labels_TNS[task_index, row, : len(labels)] = labels
    return torch.from_numpy(ids_TNS), torch.from_numpy(labels_TNS)
