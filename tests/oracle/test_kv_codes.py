"""Keys and values of 8 bits in the whole engine: how far greedy answers are from those of the compute type, and that
what happens to a request changes nothing: prefixes, preemption, chunks, aborts, what former owners left in blocks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from inlaid.config import CacheConfig, ConfigError, EngineConfig
from inlaid.engine.request import NewRequest
from inlaid.kv_format import AUTO, FP8, INT8, KVFormat, kv_format
from inlaid.model.kv import KVLayout
from inlaid.model.spec import read_spec
from inlaid.runner.memory import count_blocks
from inlaid.worker.checks import check_settings
from tests.oracle.oracle import (
    Answer,
    adapter_settings,
    add_adapter,
    ask,
    family_config,
    load_engine,
    prompts,
    save_adapter,
    save_model,
    serve,
)

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
FORMS = ("int8", "fp8")
NEAR_TIE = 0.1  # nats between the likeliest two tokens: there 8 bits may choose the other one


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a model of random weights, whose answers are close to ties, and an adapter."""
    root = tmp_path_factory.mktemp("tiny")
    save_model(root / "model", family_config("mistral"))
    save_adapter(root / "a0", root / "model", seed=0, **adapter_settings(1))
    return root / "model", root / "a0"


def first_difference(one: Answer, other: Answer) -> int | None:
    return next((at for at, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b), None)


def same(answers: dict[str, Answer], expected: dict[str, Answer]) -> None:
    """Compare answers of one form of keys and values. Sums in another order may round a code up where it was rounded
    down, so that tokens may differ in a tie."""
    for name, answer in expected.items():
        at = first_difference(answers[name], answer)
        if at is not None:
            assert abs(answers[name].logprobs[at] - answer.logprobs[at]) < 0.01, f"{name}, output {at}"


def demo_requests() -> list[NewRequest]:
    tokenizer = Tokenizer.from_file(str(DEMO / "base" / "tokenizer.json"))
    asked = []
    for name in sorted(path.name for path in (DEMO / "adapters").iterdir() if path.is_dir()):
        for line in (ROOT / "data" / name / "eval.jsonl").read_text().splitlines()[:2]:
            text = f"<|bos|><|user|>{json.loads(line)['prompt']}<|end|><|assistant|>"
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            asked.append(ask(f"{name}-{len(asked)}", ids, name, 24))
    return asked


def demo_answers(form: str) -> dict[str, Answer]:
    engine, loaded = load_engine(DEMO / "base", block_size=16, num_blocks=700, cache={"kv_cache_dtype": form})
    for path in sorted((DEMO / "adapters").iterdir()):
        if path.is_dir():
            add_adapter(loaded, path.name, path)
    return serve(engine, demo_requests())


@pytest.fixture(scope="module")
def in_full() -> dict[str, Answer]:
    return demo_answers("auto")


@pytest.mark.parametrize("form", FORMS)
def test_the_demo_answers_as_with_keys_and_values_in_full(form: str, in_full: dict[str, Answer]) -> None:
    """Each task's adapter; tokens differ in near ties alone, which are counted."""
    answers, ties = demo_answers(form), 0
    for name, answer in in_full.items():
        at = first_difference(answers[name], answer)
        if at is not None:
            ties += 1
            apart = abs(answers[name].logprobs[at] - answer.logprobs[at])
            assert apart < NEAR_TIE, f"{name}, output {at}: {apart:.3f} nats"
    print(f"{form}: {ties} of {len(in_full)} answers leave the others in a near tie")
    assert ties <= 2
    shifts = [
        abs(a - b)
        for name, answer in in_full.items()
        for a, b in zip(answers[name].logprobs[:4], answer.logprobs[:4], strict=True)
    ]
    assert max(shifts) > 0, "the codes change nothing: are they read at all?"


def tiny_requests() -> list[NewRequest]:
    """Prompts, of which some share prefixes of several blocks."""
    made = prompts(5, seed=2, longest=40)
    made += [[*made[0][:3], *range(20, 50), tail] for tail in (7, 8, 9)]
    return [ask(f"r{i}", prompt, "a0" if i % 2 else None, 10) for i, prompt in enumerate(made)]


def tiny_engine(tiny: tuple[Path, Path], form: str, **changes: Any) -> tuple[Any, Any]:
    model, adapter = tiny
    cache = {"kv_cache_dtype": form, **changes.pop("cache", {})}
    engine, loaded = load_engine(model, cache=cache, **changes)
    add_adapter(loaded, "a0", adapter)
    return engine, loaded


def poison(loaded: Any) -> None:
    """Leave behind what nobody may read: in every block but the scratch block, codes without scales."""
    for pages in loaded.runner.cache:
        pages.keys.view(torch.int8)[1:], pages.values.view(torch.int8)[1:] = 126, 126
        pages.scales[1:] = math.nan


@pytest.mark.parametrize("form", FORMS)
def test_whatever_happens_to_a_request_its_tokens_stay(tiny: tuple[Path, Path], form: str) -> None:
    requests = tiny_requests()
    calm: dict[str, Answer] = {}
    engine, loaded = tiny_engine(tiny, form, prefix=False)
    poison(loaded)
    for request in requests:
        calm |= serve(engine, [request])

    engine, loaded = tiny_engine(tiny, form)
    poison(loaded)
    same(serve(engine, requests), calm)
    again = serve(engine, requests)  # their prefixes are known now
    same(again, calm)
    assert sum(answer.num_cached for answer in again.values()) > 100

    engine, loaded = tiny_engine(tiny, form, num_blocks=30, max_num_batched_tokens=9, cache={"unified_memory": False})
    poison(loaded)
    same(serve(engine, requests), calm)
    assert engine.scheduler.num_preemptions > 0

    for request in requests[:4]:  # aborted half-way; others get their blocks
        engine.add(ask(f"gone-{request.id}", list(request.prompt), request.adapter, 30))
    for _ in range(6):
        engine.step()
    for request in requests[:4]:
        engine.abort(f"gone-{request.id}")
    while engine.has_work:
        engine.step()
    same(serve(engine, requests), calm)


@pytest.mark.parametrize("form", FORMS)
def test_memory_shared_with_adapters(tiny: tuple[Path, Path], form: str) -> None:
    requests = tiny_requests()
    engine, _ = tiny_engine(tiny, form)
    expected = serve(engine, requests)
    engine, loaded = tiny_engine(tiny, form, block_size=8, num_blocks=60, cache={"unified_memory": True})
    assert loaded.runner.stride == 2 * 3 + 1, "keys and values of three layers, and their scales"
    same(serve(engine, requests), expected)
    loaded.adapters.check()


def test_nearly_twice_the_blocks_fit_into_the_same_memory() -> None:
    config = EngineConfig(cache=CacheConfig(cpu_memory_gib=0.1))
    spec = read_spec(DEMO / "base")

    def blocks(form: KVFormat) -> int:
        layout = KVLayout(spec, 16, torch.float16, form)
        (pages, *others) = layout.pages(3, torch.device("cpu"))
        assert len(others) == spec.num_layers - 1
        found = sum(part.nbytes for part in pages if part is not None)
        assert layout.block_bytes * 3 == found * spec.num_layers, "what is counted is what is allocated"
        counted = count_blocks(config, layout, torch.device("cpu"), 4096)
        assert counted == int(config.cache.cpu_memory_gib * 2**30) // layout.block_bytes
        return counted

    width = spec.head_dim
    for form in (INT8, FP8):
        assert blocks(form) / blocks(AUTO) == pytest.approx(2 * width / (width + 2), rel=1e-3)
    assert INT8.head_bytes(128, 2) == 260, "a 7B: 1.97 times the tokens of 16 bits"
    assert AUTO.head_bytes(128, 2) == 512


def test_prefixes_of_another_form_have_other_names(tiny: tuple[Path, Path]) -> None:
    """Names of blocks say in which form they are."""
    names = set()
    for form in ("auto", *FORMS):
        engine, _ = tiny_engine(tiny, form)
        serve(engine, tiny_requests()[:1])
        names.add(next(iter(engine.scheduler.pool._block_of)))
    assert len(names) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": CacheConfig(kv_cache_dtype="fp8_e5m2")}, "keeps 2 bits .* use fp8"),
        ({"cache": CacheConfig(kv_cache_dtype="int4")}, "give one of auto, fp8"),
        ({"cache": CacheConfig(kv_cache_dtype="int8"), "decode_kernel": "one"}, "use --decode-kernel layers or auto"),
    ],
)
def test_refused_at_start(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(EngineConfig(**settings))


def test_names_of_vllm() -> None:
    assert kv_format("fp8_e4m3") is FP8
