"""An adapter or a token whose numbers overflow: its requests end alone, and every other answer is as without it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inlaid.adapters import peft
from inlaid.engine.request import FinishReason, NewRequest, Output, SamplingParams
from inlaid.llm import LLM

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPTS = ("one two", "three", "four five six", "seven eight")
NAMES = (None, "maths", "to_velar", "maths")

Ask = tuple[str, Sequence[int], str | None]


def run(llm: LLM, asks: Sequence[Ask]) -> dict[str, Output | list[int]]:
    """Return each answer's tokens, or the output that ended it with an error."""
    for name, prompt, adapter in asks:
        llm.engine.add(NewRequest(id=name, prompt=list(prompt), params=GREEDY, adapter=adapter))
    found: dict[str, Output | list[int]] = {name: [] for name, _, _ in asks}
    while llm.engine.has_work:
        for output in llm.engine.step():
            if output.finish_reason is FinishReason.ERROR:
                found[output.id] = output
            elif isinstance(tokens := found[output.id], list):
                tokens += output.tokens
    llm.engine.scheduler.check_whole()
    return found


def test_an_adapter_that_overflows_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values are finite and its product is not. The reader would refuse it; here it has slipped past."""
    folder = tmp_path / "bad"
    shutil.copytree(DEMO / "adapters" / "maths", folder)
    weights = load_file(folder / "adapter_model.safetensors")
    big = {name: torch.full_like(w.float(), 3e38) if "lora_B" in name else w.float() for name, w in weights.items()}
    save_file(big, folder / "adapter_model.safetensors")
    monkeypatch.setattr(peft, "check_values", lambda *arguments: None)
    adapters = {name: str(DEMO / "adapters" / name) for name in ("maths", "to_velar")} | {"bad": str(folder)}
    llm = LLM(str(DEMO / "base"), adapters, max_model_len=128, cache={"num_blocks": 30})
    asks = [(f"r{i}", llm.tokenizer.encode(p), name) for i, (p, name) in enumerate(zip(PROMPTS, NAMES, strict=True))]
    alone = run(llm, asks)
    for number in range(4):  # thirty blocks: those of the bad ones are used again
        bad: list[Ask] = [(f"bad{i}", [5 + number, *range(7, 7 + 40 * i)], "bad") for i in range(1, 3)]
        beside = run(llm, [asks[0], bad[0], *asks[1:3], bad[1], asks[3]])
        for name, _, _ in bad:
            ended = beside.pop(name)
            assert isinstance(ended, Output)
            assert ended.refusal is not None
            assert "adapter 'bad' computes numbers for this text that are not finite" in ended.refusal.message
        assert beside == alone


def test_a_prefix_is_not_poisoned_by_what_follows_it() -> None:
    """A token whose embedding is not finite stands for an overflow that some prompts bring about. Behind a mask it
    reaches the keys and values of tokens before it, which a request without it takes from the prefix cache."""
    llm = LLM(
        str(DEMO / "base"),
        max_model_len=256,
        scheduler={"max_num_batched_tokens": 32},
        cache={"block_size": 16, "enable_prefix_caching": True},
    )
    poison, prefix = 1000, list(range(20, 36))
    runner: Any = llm.engine.runner
    runner.model.embedding.weight_VD[poison] = math.nan
    good: Ask = ("good", [*prefix, 40, 41], None)
    alone = run(llm, [good])
    llm.engine.scheduler.pool.clear()
    bad: Ask = ("bad", [*prefix, poison, *range(50, 110)], None)
    beside = run(llm, [bad, good])
    assert isinstance(beside.pop("bad"), Output)
    assert beside == alone
    assert run(llm, [good]) == alone
