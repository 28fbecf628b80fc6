"""The predictor learns lengths per task, says how sure it is, and takes long tails for what they are."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from inlaid.engine.account import Account
from inlaid.engine.predictor import Oracle, Predictor
from inlaid.engine.request import FinishReason, Request, SamplingParams


def make(
    task: str | None = "a", prompt: list[int] | None = None, most: int = 4096, id: str = "r", true: int | None = None
) -> Request:
    prompt = prompt or [1, 2, 3]
    return Request(
        id=id,
        prompt=prompt,
        params=SamplingParams(max_tokens=most),
        adapter=task,
        adapter_name=task,
        account=Account("", 0),
        arrival=0.0,
        true_output_len=true,
        tokens=list(prompt),
        limit=len(prompt) + most,
    )


def finish(predictor: Predictor, request: Request, length: int, reason: FinishReason = FinishReason.STOP) -> None:
    predictor.remaining(request)
    request.tokens += [0] * length
    request.finish_reason = reason
    predictor.observe(request)


def draw(rng: random.Random, task: str) -> tuple[list[int], int]:
    """Lengths depend on the task and on a word of the prompt, with noise of a factor of 1.3."""
    word = rng.randrange(3)
    mean = {"short": 8, "long": 300}[task] * (1, 2, 4)[word]
    return [5, 100 + word, 9], max(1, round(mean * math.exp(rng.gauss(0, 0.26))))


def test_it_learns_tasks_and_words_from_history() -> None:
    rng, predictor = random.Random(0), Predictor()
    for _ in range(600):
        task = rng.choice(["short", "long"])
        prompt, length = draw(rng, task)
        finish(predictor, make(task, prompt), length)
    for task, base in (("short", 8), ("long", 300)):
        for word in range(3):
            guess = predictor.remaining(make(task, [5, 100 + word, 9]))
            assert guess == pytest.approx(base * (1, 2, 4)[word], rel=0.4)


def test_its_quantiles_cover_what_they_say() -> None:
    rng, predictor = random.Random(1), Predictor()
    inside = {0.1: 0, 0.5: 0, 0.9: 0}
    for number in range(2000):
        prompt, length = draw(rng, "long")
        request = make("long", prompt)
        if number >= 500:
            for share in inside:
                inside[share] += length <= predictor.quantile(request, share)
        finish(predictor, request, length)
    for share, count in inside.items():
        assert count / 1500 == pytest.approx(share, abs=0.05)


def test_the_longer_an_answer_of_a_heavy_tailed_task_runs_the_more_is_expected() -> None:
    rng, predictor = random.Random(2), Predictor()
    for _ in range(2000):
        finish(predictor, make(most=100_000), max(1, round(10 * rng.paretovariate(1.1))))
    request = make(most=100_000)
    expected = [predictor.remaining(request)]
    for made in (50, 200):
        request.tokens = [*request.prompt, *[0] * made]
        expected.append(predictor.remaining(request))
    assert expected == sorted(expected)
    assert expected[2] > 100


def test_what_is_still_to_come_never_exceeds_the_limit_and_is_never_nothing() -> None:
    predictor = Predictor()
    request = make(most=20)
    for made in range(20):
        request.tokens = [*request.prompt, *[0] * made]
        assert 1 <= predictor.remaining(request) <= 20 - made


def test_answers_cut_off_early_teach_nothing_and_late_ones_raise_the_guess() -> None:
    predictor = Predictor()
    for _ in range(100):
        finish(predictor, make(), 100)
    before = predictor.remaining(make())
    for _ in range(50):
        finish(predictor, make(), 3, FinishReason.ABORT)
    assert predictor.remaining(make()) == before
    for _ in range(50):
        finish(predictor, make(), 900, FinishReason.LENGTH)
    assert predictor.remaining(make()) > 2 * before


def test_it_is_kept_on_disk_and_read_back_the_same(tmp_path: Path) -> None:
    rng, predictor = random.Random(3), Predictor()
    for _ in range(100):
        prompt, length = draw(rng, "short")
        finish(predictor, make("short", prompt), length)
    path = tmp_path / "predictor.json"
    predictor.save(path)
    assert list(tmp_path.iterdir()) == [path]
    again = Predictor.load(path)
    for task in ("short", "unseen"):
        assert again.remaining(make(task)) == pytest.approx(predictor.remaining(make(task)), rel=1e-3)


@pytest.mark.parametrize("fault", ["{", "[]", '{"version": 1}', "\x80"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "predictor.json"
    path.write_bytes(fault.encode("latin-1"))
    with pytest.raises(ValueError, match="delete it"):
        Predictor.load(path)


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictor.json"
    Predictor().save(path)
    state = json.loads(path.read_text())
    state["weights"] = {"99999999": 1.0}
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="another version"):
        Predictor.load(path)


def test_a_flood_of_tasks_is_remembered_only_up_to_a_bound() -> None:
    predictor = Predictor(max_adapters=10)
    for number in range(100):
        finish(predictor, make(f"task{number}"), 5)
    assert len(predictor._histograms) <= 10
    assert predictor.remaining(make("task0")) > 0


def test_oracles_know_or_err_by_a_factor_and_always_alike() -> None:
    assert Oracle().remaining(make(true=40)) == 40
    noisy = Oracle(noise=2.0, seed=1)
    guesses = [noisy.remaining(make(id=f"r{i}", true=300)) for i in range(200)]
    assert guesses == [noisy.remaining(make(id=f"r{i}", true=300)) for i in range(200)]
    assert 100 <= min(guesses) < 150
    assert 600 < max(guesses) <= 900
    with pytest.raises(ValueError, match="noise"):
        Oracle(noise=-1.0)
