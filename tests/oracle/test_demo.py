"""The bundled demo against transformers + peft: all twelve adapters and the base in one batch, on their own prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.oracle.oracle import Judge, add_adapter, ask, load_engine, serve

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
ADAPTERS = {path.name: path for path in sorted((DEMO / "adapters").iterdir()) if path.is_dir()}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(DEMO / "base", ADAPTERS)


@pytest.mark.parametrize(("budget", "blocks"), [(2048, 600), (48, 600), (2048, 70)])
def test_twelve_adapters_in_one_batch(judge: Judge, budget: int, blocks: int) -> None:
    """Whole prompts, chunked prompts, and so few blocks that requests are preempted."""
    tokenizer = Tokenizer.from_file(str(DEMO / "base" / "tokenizer.json"))
    engine, loaded = load_engine(DEMO / "base", block_size=16, num_blocks=blocks, max_num_batched_tokens=budget)
    for name, folder in ADAPTERS.items():
        add_adapter(loaded, name, folder)
    requests = []
    for index, name in enumerate([*ADAPTERS, *ADAPTERS][:15]):
        line = (ROOT / "data" / name / "eval.jsonl").read_text().splitlines()[index]
        text = f"<|bos|><|user|>{json.loads(line)['prompt']}<|end|><|assistant|>"
        requests.append(ask(f"{name}-{index}", tokenizer.encode(text, add_special_tokens=False).ids, name, 40))
    requests.append(ask("base", requests[0].prompt, None, 40))
    answers = serve(engine, requests)
    assert (engine.scheduler.num_preemptions > 0) == (blocks == 70)
    for request in requests:
        judge.check(request, answers[request.id])
    loaded.adapters.check()


def test_every_adapter_matters(judge: Judge) -> None:
    """Each adapter's answer differs from the base's: an adapter that does nothing would pass unseen otherwise."""
    prompt = [1, *range(20, 40)]
    base = judge.logits(prompt, None)
    for name in ADAPTERS:
        assert float((judge.logits(prompt, name) - base).abs().max()) > 0.1, name
