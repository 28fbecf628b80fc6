"""The bundled demo on the GPU beside the CPU: greedy tokens of evaluation prompts of every task, each with its adapter,
and how close the call was where they part. One stage of bench.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inlaid.config import AdapterConfig, EngineConfig
from inlaid.engine.process import Loaded, build_engine
from inlaid.engine.request import NewRequest, SamplingParams

MODEL = Path("models/demo/base")
ADAPTERS = Path("models/demo/adapters")
PROMPTS, TOKENS = 25, 48  # of each task


def questions() -> list[tuple[str, str, list[int]]]:
    """(id, adapter, tokens)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    found = []
    for adapter in sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir()):
        lines = Path(f"data/{adapter}/eval.jsonl").read_text().splitlines()[:PROMPTS]
        for index, line in enumerate(lines):
            ids = tokenizer.encode(json.loads(line)["prompt"]).ids
            found.append((f"{adapter}/{index}", adapter, ids))
    return found


def answer(device: str, dtype: str, num_top: int | None) -> dict[str, tuple[list[int], list[float]]]:
    """Tokens, and by how much each beat the runner-up where `num_top` asks for it."""
    names = sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir())
    config = EngineConfig(
        model=str(MODEL), device=device, dtype=dtype, adapters=AdapterConfig(max_loras=len(names), max_lora_rank=64)
    )
    loaded: Loaded = build_engine(config, {name: str(ADAPTERS / name) for name in names})
    for name, adapter, ids in questions():
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0, logprobs=num_top)
        loaded.engine.add(NewRequest(id=name, prompt=ids, adapter=adapter, params=params))
    found: dict[str, tuple[list[int], list[float]]] = {}
    while loaded.engine.has_work:
        for output in loaded.engine.step():
            assert output.message is None, output.message
            tokens, leads = found.setdefault(output.id, ([], []))
            tokens += output.tokens
            leads += [one.top[0][1] - one.top[1][1] for one in output.logprobs or []]
    return found


def run() -> dict[str, Any]:
    """The share of prompts with equal tokens, and the lead of the CPU's token at every first difference."""
    cpu = answer("cpu", "float32", 2)
    gpu = answer("cuda", "float16", None)
    again = answer("cuda", "float16", None)
    differing = {}
    for name, (tokens, leads) in cpu.items():
        other = gpu[name][0]
        if other != tokens:
            place = next((i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), None)
            differing[name] = None if place is None else round(leads[place], 4)
    report = {
        "prompts": len(cpu), "equal": len(cpu) - len(differing), "share": 1 - len(differing) / len(cpu),
        "lead_at_first_difference": differing,
        "same_on_the_gpu_twice": sum(gpu[name][0] == again[name][0] for name in gpu) / len(gpu),
    }  # fmt: skip
    print(report, flush=True)
    return report
