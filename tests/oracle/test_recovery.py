"""A request that the real model fails on ends alone: the tokens of those in the same steps are as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inlaid.engine.request import FinishReason, NewRequest, SamplingParams
from inlaid.llm import LLM

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"seed": 3, "presence_penalty": 0.5}], ids=["greedy", "drawn"]
)
def test_a_token_beyond_the_embedding_harms_no_bystander(params: dict[str, Any]) -> None:
    adapters = {name: str(DEMO / "adapters" / name) for name in ("to_velar", "maths")}
    llm = LLM(str(DEMO / "base"), adapters, max_model_len=128)
    prompts = ["one two", "three", "four five six", "seven"]
    names = [None, "to_velar", "maths", "to_velar"]
    sampling = SamplingParams(max_tokens=10, ignore_eos=True, **params)
    alone = [answer.tokens for answer in llm.generate(prompts, sampling, names, progress=False)]
    engine = llm.engine
    for index, (prompt, name) in enumerate(zip(prompts, names)):
        tokens = llm.tokenizer.encode(prompt)
        engine.add(NewRequest(id=f"r{index}", prompt=tokens, params=sampling, adapter=name))
    engine.add(NewRequest(id="bad", prompt=[1, 10**6, 2], params=sampling, adapter="maths"))
    answers: dict[str, list[int]] = {f"r{index}": [] for index in range(len(prompts))}
    ends = {}
    while engine.has_work:
        for output in engine.step():
            answers.setdefault(output.id, []).extend(output.tokens)
            ends[output.id] = output.finish_reason or ends.get(output.id)
    assert ends.pop("bad") is FinishReason.ERROR
    assert set(ends.values()) == {FinishReason.LENGTH}
    assert [answers[f"r{index}"] for index in range(len(prompts))] == alone
    assert engine.num_failures == 1
