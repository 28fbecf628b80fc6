"""lm-eval's scoring requests (its local-completions model): echo with logprobs, token-id prompts, batches sorted by
index; and the figures are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.server.live import DEMO, Live


def score(server: Live, sequences: list[list[int]], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """Score as lm-eval does."""
    body = {
        "model": "demo",
        "prompt": sequences,
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "temperature": 0,
        "seed": 1234,
    }
    answer = server.ask("POST", "/v1/completions", body)
    assert answer.status == 200, answer.body
    return [
        read(choice, length)
        for choice, length in zip(sorted(answer.json["choices"], key=lambda c: c["index"]), context_lengths)
    ]


def read(choice: dict[str, Any], length: int) -> tuple[float, bool]:
    logprobs = choice["logprobs"]["token_logprobs"][length:-1]
    tops = choice["logprobs"]["top_logprobs"][length:-1]
    greedy = all(token == max(top.values()) for token, top in zip(logprobs, tops))
    return sum(logprobs), greedy


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 900, (length,), generator=generator).tolist() for length in (9, 30, 4, 17)]


def test_scores_are_those_of_transformers(server: Live, sequences: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(DEMO / "base"), dtype=torch.float32)
    contexts = [3, 10, 1, 16]
    for (total, greedy), ids, length in zip(score(server, sequences, contexts), sequences, contexts):
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = [logprobs[at - 1, ids[at]] for at in range(length, len(ids))]
        best = [int(logprobs[at - 1].argmax()) == ids[at] for at in range(length, len(ids))]
        assert total == pytest.approx(float(sum(wanted)), abs=1e-3)
        assert greedy == all(best)


def test_a_greedy_continuation_scores_as_greedy(server: Live) -> None:
    prompt = [5, 60, 70, 80]
    body = {"model": "demo", "prompt": prompt, "max_tokens": 6, "temperature": 0, "return_token_ids": True}
    made = server.ask("POST", "/v1/completions", {**body, "ignore_eos": True}).json["choices"][0]["token_ids"]
    assert score(server, [prompt + made], [len(prompt)])[0][1] is True


def test_order_and_company_change_nothing(server: Live, sequences: list[list[int]]) -> None:
    together = score(server, sequences, [2] * 4)
    backwards = score(server, sequences[::-1], [2] * 4)[::-1]
    alone = [score(server, [ids], [2])[0] for ids in sequences]
    for a, b, c in zip(together, backwards, alone):
        assert a[0] == pytest.approx(b[0], abs=1e-3)
        assert a[0] == pytest.approx(c[0], abs=1e-3)


def test_echo_without_new_tokens(server: Live) -> None:
    body = {"model": "demo", "prompt": "the sea", "max_tokens": 0, "echo": True, "logprobs": 0}
    choice = server.ask("POST", "/v1/completions", body).json["choices"][0]
    assert choice["text"] == "the sea"
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"][1:])
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["text_offset"])
