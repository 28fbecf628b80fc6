"""The engine in this process as a backend: all adapters at once, batched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from eval.backend import Ask, Graded
from eval.provenance import code_identity
from inlaid import LLM, SamplingParams
from inlaid.engine.request import TokenLogprobs
from inlaid.kv_format import AUTO

PARTS = (
    "engine",
    "text",
    "runner",
    "worker",
    "model",
    "layers",
    "kernels",
    "adapters",
    "llm.py",
    "checkpoint.py",
    "kv_format.py",
)


class EngineBackend:
    """A Backend that runs the engine."""

    drafts = True

    def __init__(self, base: Path, adapters: Mapping[str, Path], kv: str = AUTO.name) -> None:
        self.llm = LLM(str(base), adapters={}, cache={"cpu_memory_gib": 0.5, "kv_cache_dtype": kv})
        self.refused: dict[str, str] = {}
        for name, path in adapters.items():
            try:
                self.llm.load_adapter(name, str(path))
            except ValueError as error:
                self.refused[name] = str(error)

    def generate(self, asks: Sequence[Ask]) -> list[list[int] | str]:
        params = [SamplingParams(max_tokens=ask.max_tokens, temperature=0.0, stop=ask.stop) for ask in asks]
        completions = self.llm.generate(
            [ask.prompt for ask in asks], params, [ask.adapter for ask in asks], progress=False
        )
        return [completion.tokens for completion in completions]

    def grade(self, asks: Sequence[Ask], continuations: Sequence[Sequence[int]]) -> list[Graded]:
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        prompts = [(*ask.prompt, *continuation) for ask, continuation in zip(asks, continuations)]
        completions = self.llm.generate(prompts, params, [ask.adapter for ask in asks], progress=False)
        return [
            _graded(completion.prompt_logprobs or [], len(ask.prompt)) for completion, ask in zip(completions, asks)
        ]

    def close(self) -> None:
        del self.llm


def setting() -> str:
    """Return what decides the engine's numbers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"inlaid {code_identity(*PARTS)}, {device}, torch {torch.__version__}"


def _graded(logprobs: Sequence[TokenLogprobs | None], start: int) -> Graded:
    """Return the grades of the tokens from `start` on; a token of rank 1 is what greedy decoding chooses."""
    chosen = [one for one in logprobs[start:] if one is not None]
    return Graded(tuple(one.logprob for one in chosen), tuple(one.rank == 1 for one in chosen))
