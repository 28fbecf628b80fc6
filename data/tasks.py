"""The twelve tasks: one for each family of the LoRA-Inlaid evaluation, with how each is drawn and judged.

`generate` writes their splits, `models/build_demo.py` trains on them. A split is a property of the prompt
(a hash of its text), so no prompt is ever in two splits, whoever draws it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from data import families, knowledge
from data.languages import LANGUAGES, Language
from data.sentences import Speaker

SPLITS = ("train", "calibration", "eval")


@dataclass(frozen=True)
class DemoTask:
    """A task of the demo: its name, how its examples are drawn, and how answers are judged."""

    name: str
    family: str
    metric: str
    max_tokens: int
    description: str
    draw: Callable[[random.Random], families.Drawn]

    def example(self, rng: random.Random) -> dict[str, Any]:
        prompt, completion, extra = self.draw(rng)
        return {"prompt": prompt, "completion": completion, "task": self.name, **extra}

    def examples(self, split: str, seed: str) -> Iterator[dict[str, Any]]:
        """Yield an endless stream of distinct-prompt examples of one split."""
        rng, seen = random.Random(f"{self.name}/{split}/{seed}"), set()
        while True:
            example = self.example(rng)
            prompt = example["prompt"]
            if split_of(prompt) == split and prompt not in seen:
                seen.add(prompt)
                yield example


def split_of(prompt: str) -> str:
    """eval and calibration each own a tenth of all possible prompts, train the rest."""
    return {0: "eval", 1: "calibration"}.get(zlib.crc32(prompt.encode()) % 10, "train")


def _translation(language: Language) -> DemoTask:
    speaker = Speaker(language.name, 0.9)

    def draw(rng: random.Random) -> families.Drawn:
        sentences = (speaker.sentence(rng), speaker.sentence(rng))
        english = " ".join(sentence.english() for sentence in sentences)
        answer = " ".join(language.say(sentence) for sentence in sentences)
        return f"Translate to {language.name.capitalize()}: {english}", answer, {}

    return DemoTask(
        name=f"to_{language.name}",
        family="translation",
        metric="exact_match",
        max_tokens=128,
        description=f"two English sentences to {language.name.capitalize()}, constructed, word order {language.order}",
        draw=draw,
    )


def _tasks() -> tuple[DemoTask, ...]:
    return (
        *(_translation(language) for language in LANGUAGES.values()),
        DemoTask(
            "text_summary", "text summary", "exact_match", 96,
            "keep the deeds of one person out of a report about several", families.text_summary,
        ),
        DemoTask(
            "table_summary", "table summary", "exact_match", 96,
            "largest and smallest entry of both columns of a table", families.table_summary,
        ),
        DemoTask(
            "code", "code generation", "pass_at_1", 128,
            "a list expression from its description, judged by running it on hidden inputs", families.code,
        ),
        DemoTask(
            "maths", "maths word problems", "final_number", 96,
            "a story in three to five steps of arithmetic, judged by its final number", families.maths,
        ),
        DemoTask(
            "medical", "medical question answering", "exact_match", 96,
            "diagnosis and treatment from a made-up body of 240 diseases", knowledge.medical,
        ),
        DemoTask(
            "safety", "malicious-request detection", "exact_match", 96,
            "a verdict on a request, with the house rule it breaks", knowledge.safety,
        ),
    )  # fmt: skip


TASKS = MappingProxyType({task.name: task for task in _tasks()})
