"""Steps that check guesses, on a GPU: their time by requests and guesses, and whether answers stay what they are. A
stage of bench.py.

Random weights make no text that repeats itself, so the guesses are the answers that plain decoding gave, all right or
with every third one wrong. Acceptance is measured on the demo (`python -m perf.speculation`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from statistics import median
from types import MappingProxyType
from typing import Any

from inlaid.config import SpeculationConfig
from inlaid.engine.request import NewRequest, Request, SamplingParams
from inlaid.engine.speculation import Draft, Speculation
from inlaid.worker.build import Loaded
from perf.gpu import Keep, offline

ADAPTERS: Mapping[str, int] = MappingProxyType({"7b": 32, "8b": 32, "tiny": 2})
CONCURRENCIES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"7b": (1, 4, 16, 64), "8b": (1, 4, 16, 64), "tiny": (1, 2)}
)
GUESSES = (1, 3, 7)
WRONG = 3  # every so many tokens of an answer, in the turns with wrong guesses
OUTPUT: Mapping[str, int] = MappingProxyType({"7b": 128, "8b": 128, "tiny": 6})


class Remembered:
    """Guesses known answers, every `wrong`-th token of them wrong; 0: none."""

    def __init__(self, answers: Mapping[str, list[int]], guesses: int, wrong: int) -> None:
        self._answers, self._guesses, self._wrong = answers, guesses, wrong

    def draft(self, request: Request, most: int) -> Draft | None:
        first = request.num_outputs
        known = self._answers[request.id.partition(":")[2]][first:][: min(most, self._guesses)]
        tokens = tuple(t ^ 1 if self._wrong and (first + i) % self._wrong == 0 else t for i, t in enumerate(known))
        return Draft(tokens, match=4) if tokens else None

    def end(self, request: Request) -> None:
        """Do nothing: there is nothing to learn."""


def serve(loaded: Loaded, prompts: Mapping[str, list[int]], names: list[str], output: int, turn: str) -> dict[str, Any]:
    """Answer all prompts side by side; return the answers, and the time of the steps that had no prompts."""
    engine = loaded.engine
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    for i, (name, prompt) in enumerate(prompts.items()):
        engine.add(NewRequest(id=f"{turn}:{name}", prompt=prompt, params=params, adapter=names[i % len(names)]))
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    started: set[str] = set()
    steps: list[float] = []
    begin = made = 0.0
    while engine.has_work:
        whole = len(started) == len(prompts)
        now = time.perf_counter()
        begin = begin or (now if whole else 0.0)
        for output_ in engine.step():
            assert output_.refusal is None, output_.refusal
            name = output_.id.partition(":")[2]
            answers[name] += output_.tokens
            started.add(name)
            made += len(output_.tokens) if whole else 0
        if whole:
            steps.append(time.perf_counter() - now)
    seconds = time.perf_counter() - begin
    return {
        "answers": answers,
        "tokens_per_second": made / seconds,
        "ms_per_token": seconds / made * len(prompts) * 1e3,
        "median_step_ms": median(steps) * 1e3,
    }


def run(shape: str, keep: Keep) -> dict[str, Any]:
    """Measure plain decoding, then steps of every number of guesses, at several concurrencies."""
    config = SpeculationConfig(speculation="suffix", num_speculative_tokens=max(GUESSES), speculation_length="fixed")
    loaded, spec = offline.load(shape, ADAPTERS[shape], speculation=config)
    scheduler, generator = loaded.engine.scheduler, random.Random(5)
    names = [f"a{i}" for i in range(ADAPTERS[shape])]
    report: dict[str, Any] = {"shape": shape, "adapters": len(names), "rows": []}
    for concurrency in CONCURRENCIES[shape]:
        size = 16 if shape == "tiny" else offline.PROMPT
        prompts = {
            f"{concurrency}-{i}": [generator.randrange(3, spec.vocab_size) for _ in range(size)]
            for i in range(concurrency)
        }
        scheduler.state.speculation = None
        serve(loaded, prompts, names, 2, "warm")
        plain = serve(loaded, prompts, names, OUTPUT[shape], "plain")
        for guesses in GUESSES:
            for wrong in (0, WRONG):
                speculation = Speculation(config, Remembered(plain["answers"], guesses, wrong))
                scheduler.state.speculation = speculation
                fast = serve(loaded, prompts, names, OUTPUT[shape], f"{guesses}-{wrong}")
                row = {
                    "concurrency": concurrency,
                    "guesses": guesses,
                    "wrong": f"every {wrong}rd" if wrong else "none",
                    "accepted": speculation.total.accepted / max(1, speculation.total.guesses),
                    "equal_answers": sum(fast["answers"][name] == plain["answers"][name] for name in prompts),
                    "times_faster": fast["tokens_per_second"] / plain["tokens_per_second"],
                    "plain": {key: value for key, value in plain.items() if key != "answers"},
                    **{key: value for key, value in fast.items() if key != "answers"},
                }
                report["rows"].append(row)
                keep(report)
                print(row, flush=True)
        scheduler.state.speculation = None
    return report
