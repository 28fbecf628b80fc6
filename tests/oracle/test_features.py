"""Sampling features through the real engine and a real model, each against the judge's own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inlaid.engine.request import FinishReason, NewRequest, SamplingParams
from tests.oracle.oracle import (
    Judge,
    add_adapter,
    ask,
    family_config,
    load_engine,
    prompts,
    save_adapter,
    save_model,
    serve,
)

STOP = 5


class World:
    """One tiny model with one adapter."""

    def __init__(self, folder: Path) -> None:
        save_model(folder / "model", family_config("llama"))
        save_adapter(folder / "a", folder / "model", 1, r=4, target_modules=["q_proj", "up_proj"])
        self.judge = Judge(folder / "model", {"a": folder / "a"})
        self.engine, self.loaded = load_engine(folder / "model")
        add_adapter(self.loaded, "a", folder / "a")

    def answer(self, prompt: list[int], **params: object) -> list[int]:
        request = ask("r", prompt, "a", **params)
        return serve(self.engine, [request])["r"].tokens

    def choose(self, prompt: list[int], count: int, score: object) -> list[int]:
        """Greedy tokens of the judge, its logits changed by `score(logits, prompt, outputs)` at every place."""
        outputs: list[int] = []
        for _ in range(count):
            logits = self.judge.logits([*prompt, *outputs], "a")[-1]
            outputs.append(int(score(logits.clone(), prompt, outputs).argmax()))  # type: ignore[operator]
        return outputs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_penalties(world: World) -> None:
    def score(logits: torch.Tensor, prompt: list[int], outputs: list[int]) -> torch.Tensor:
        for token in set(prompt + outputs):
            logits[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3
        for token in set(outputs):
            logits[token] -= 0.4 * outputs.count(token) + 0.7
        return logits

    for prompt in prompts(3, 11):
        want = world.choose(prompt, 15, score)
        settings = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.7}
        assert world.answer(prompt, max_tokens=15, **settings) == want
        assert world.answer(prompt, max_tokens=15) != want


def test_logit_bias(world: World) -> None:
    prompt = prompts(1, 12)[0]
    assert world.answer(prompt, max_tokens=4, logit_bias={33: 100.0}) == [33] * 4
    first = world.answer(prompt, max_tokens=1)[0]
    assert world.answer(prompt, max_tokens=1, logit_bias={first: -100.0})[0] != first


def test_allowed_tokens(world: World) -> None:
    def score(logits: torch.Tensor, prompt: list[int], outputs: list[int]) -> torch.Tensor:
        kept = torch.full_like(logits, -torch.inf)
        kept[[3, 33, 40, 41]] = logits[[3, 33, 40, 41]]
        return kept

    prompt = prompts(1, 12)[0]
    assert world.answer(prompt, max_tokens=6, allowed_token_ids=(3, 33, 40, 41)) == world.choose(prompt, 6, score)
    drawn = world.answer(prompt, max_tokens=30, allowed_token_ids=(3, 33, 40), temperature=5.0, top_p=0.9, seed=1)
    assert set(drawn) == {3, 33, 40}


def test_an_end_that_is_all_there_is_comes_before_min_tokens(world: World) -> None:
    prompt, ends = prompts(1, 12)[0], {"stop_token_ids": (STOP,), "ignore_eos": True, "min_tokens": 4}
    assert world.answer(prompt, max_tokens=6, allowed_token_ids=(STOP,), **ends) == [STOP] * 4
    held = world.answer(prompt, max_tokens=6, allowed_token_ids=(STOP, 33), logit_bias={STOP: 100.0}, **ends)
    assert held == [33] * 4 + [STOP]


def test_bad_words(world: World) -> None:
    """Each word is what would be said without it: its last token goes to the next best, as often as it is tried."""
    prompt = prompts(1, 12)[0]
    free = world.answer(prompt, max_tokens=6)
    words = ((free[0],), tuple(free[2:4]))

    def score(logits: torch.Tensor, prompt: list[int], outputs: list[int]) -> torch.Tensor:
        for word in words:
            if outputs[len(outputs) - len(word) + 1 :] == list(word[:-1]):
                logits[word[-1]] = -torch.inf
        return logits

    made = world.answer(prompt, max_tokens=6, bad_words=words)
    assert made == world.choose(prompt, 6, score)
    assert free[0] not in made
    only = tuple(world.answer(prompt, max_tokens=3, bad_words=words[1:]))
    assert only[:2] == tuple(free[:2])


def test_a_bad_word_gives_way_where_nothing_else_may_be_said(world: World) -> None:
    settings = {"allowed_token_ids": (33, 34), "bad_words": ((33, 34), (33, 33), (34,))}
    assert world.answer(prompts(1, 12)[0], max_tokens=4, **settings)[0] == 33
    assert set(world.answer(prompts(1, 12)[0], max_tokens=4, **settings)) <= {33, 34}


def test_stop_tokens_and_min_tokens(world: World) -> None:
    prompt = prompts(1, 13)[0]
    settings = {"stop_token_ids": (STOP,), "logit_bias": {STOP: 100.0}, "ignore_eos": True}
    assert world.answer(prompt, max_tokens=9, **settings) == [STOP]
    held = world.answer(prompt, max_tokens=9, min_tokens=4, **settings)
    assert len(held) == 5
    assert held.index(STOP) == 4


def test_top_logprobs_and_ranks(world: World) -> None:
    prompt = prompts(1, 14)[0]
    forced = {33: 100.0}
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=4, logit_bias=forced, prompt_logprobs=2)
    world.engine.add(NewRequest(id="r", prompt=prompt, adapter="a", params=params))
    outputs = [output for _ in range(3) for output in world.engine.step()]
    entry = outputs[0].logprobs[0]
    want = world.judge.logits(prompt, "a").log_softmax(-1)
    top = want[-1].topk(4)
    assert entry.token == 33
    assert entry.rank == int((want[-1] > want[-1][33]).sum()) + 1
    assert entry.logprob == pytest.approx(float(want[-1][33]), abs=1e-4)
    assert [token for token, _ in entry.top] == top.indices.tolist()
    assert [value for _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert outputs[0].finish_reason is FinishReason.LENGTH
    told = outputs[0].prompt_logprobs
    assert told[0] is None
    for place, before in enumerate(told[1:], start=1):
        assert before.token == prompt[place]
        assert [token for token, _ in before.top] == want[place - 1].topk(2).indices.tolist()


def test_a_draw_is_the_argmax_of_noise_and_logits(world: World) -> None:
    """Drawn tokens, from the published definition of the noise and the judge's logits."""
    from inlaid.layers.sampler import gumbel, seed_key

    prompt, temperature, seed = prompts(1, 15)[0], 0.8, 77

    def score(logits: torch.Tensor, prompt: list[int], outputs: list[int]) -> torch.Tensor:
        position = torch.tensor([len(prompt) + len(outputs)])
        return logits / temperature + gumbel(torch.tensor([seed_key(seed)]), position, logits.shape[0])[0]

    want = world.choose(prompt, 10, score)
    assert world.answer(prompt, max_tokens=10, temperature=temperature, seed=seed) == want


def test_rows_with_and_without_features_do_not_disturb_each_other(world: World) -> None:
    prompt = prompts(1, 16)[0]
    settings: list[dict[str, object]] = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"logit_bias": {9: 50.0}},
        {"frequency_penalty": 1.0},
        {"temperature": 0.7, "top_k": 3, "seed": 4, "presence_penalty": 0.5},
        {"temperature": 1.2, "min_p": 0.1, "seed": 5},
        {"stop_token_ids": (STOP,), "min_tokens": 5},
    ]
    together = serve(world.engine, [ask(f"r{i}", prompt, "a", **params) for i, params in enumerate(settings)])
    for i, params in enumerate(settings):
        assert together[f"r{i}"].tokens == world.answer(prompt, **params), params
