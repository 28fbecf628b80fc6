"""The eager runner, made from a configuration: choices, refusals, exact counts of KV memory, and steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from inlaid.config import AdapterConfig, CacheConfig, ConfigError, EngineConfig
from inlaid.engine.account import Account
from inlaid.engine.request import Batch, Request, SamplingParams, Work
from inlaid.model.kv import KVLayout
from inlaid.worker.loading import load_model, make_store


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    spec = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(spec).save_pretrained(folder)
    return EngineConfig(model=str(folder), device="cpu", cache=CacheConfig(block_size=8, num_blocks=40))


def request(name: str, prompt: list[int], blocks: list[int], **params: object) -> Request:
    settings = SamplingParams(temperature=0.0, max_tokens=8, **params)
    made = Request(
        id=name, prompt=prompt, params=settings, adapter=None, adapter_name=None, account=Account("", 0), arrival=0.0,
        tokens=list(prompt),
    )  # fmt: skip
    made.blocks = blocks
    return made


def test_what_is_loaded(config: EngineConfig) -> None:
    loaded = load_model(config, progress=False)
    assert loaded.dtype is torch.float32
    assert loaded.max_model_len == 128
    assert loaded.num_blocks == 40
    assert len(loaded.base_version) == 64
    assert loaded.runner.overlap is False
    k, v, _ = loaded.runner.cache[0]
    assert k.shape == v.shape == (40, 8, 2, 8)
    assert KVLayout(loaded.spec, 8, torch.float32).block_bytes * 40 == 2 * (k.nbytes + v.nbytes)


def test_blocks_fill_the_memory_given(config: EngineConfig) -> None:
    loaded = load_model(replace(config, cache=CacheConfig(block_size=8, cpu_memory_gib=0.001)), progress=False)
    each = KVLayout(loaded.spec, 8, torch.float32).block_bytes
    assert loaded.num_blocks == int(0.001 * 2**30) // each
    assert sum(k.nbytes + v.nbytes for k, v, _ in loaded.runner.cache) <= 0.001 * 2**30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 129}, "above the 128 positions"),
        ({"cache": CacheConfig(block_size=8, cpu_memory_gib=1e-5)}, "fewer than one request of max_model_len"),
        ({"linear_backend": "exllama"}, "exllama"),
        ({"model": "./nowhere"}, "neither a folder"),
    ],
)
def test_refused(config: EngineConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(replace(config, **changes), progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_is_refused_without_one(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        load_model(replace(config, device="cuda"), progress=False)


def test_room_for_adapters_is_as_given(config: EngineConfig) -> None:
    given = replace(config, adapters=AdapterConfig(max_loras=3, adapter_memory_gib=0.5 / 1024))
    loaded = load_model(given, progress=False)
    assert loaded.adapters.capacity_bytes == 2**19
    assert loaded.adapters.pages.table.shape == (4, 14, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AdapterConfig(adapter_mode="lazy"), "known: cached, on-demand, pipelined$"),
        (AdapterConfig(adapter_mode="cpu-assist"), "is retired.*assist-map"),
        (AdapterConfig(adapter_link_gbps=1.0), "without a GPU; leave it 0 on cuda"),
        (AdapterConfig(max_cpu_adapter_gib=-1.0), "cannot be negative"),
        (AdapterConfig(adapter_timeout=0.0), "adapter_timeout must be above 0"),
    ],
)
def test_adapter_settings_that_a_gpu_refuses(config: EngineConfig, settings: AdapterConfig, message: str) -> None:
    spec = load_model(config, progress=False).spec
    with pytest.raises(ConfigError, match=message):
        make_store(settings, spec, torch.device("cuda"), torch.float16)


def test_prefill_and_decode_agree(config: EngineConfig) -> None:
    """A token computed at the end of a prompt and the same one computed alone afterwards give the same next token,
    and what other rows do in the step changes nothing."""
    runner = load_model(config, progress=False).runner
    prompt = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
    whole = request("whole", prompt, [1, 2], logprobs=0)
    first = runner.collect(runner.submit(Batch(1, (Work(whole, 0, 11, True),))))
    split = request("split", prompt, [3, 4], logprobs=0)
    runner.submit(Batch(2, (Work(split, 0, 10, False),)))
    other = request("other", [1, 2, 3], [5])
    works = (Work(split, 10, 1, True), Work(other, 0, 3, False))
    second = runner.collect(runner.submit(Batch(3, works)))
    assert len(second.sampled) == 1
    a, b = first.sampled[0], second.sampled[0]
    assert a.token == b.token
    assert a.logprobs is not None
    assert b.logprobs is not None
    assert a.logprobs.logprob == pytest.approx(b.logprobs.logprob, abs=1e-5)


def test_released_rows_are_forgotten(config: EngineConfig) -> None:
    runner = load_model(config, progress=False).runner
    penalized = request("p", [1, 2, 3], [1], frequency_penalty=1.0)
    drawn = request("d", [1, 2, 3], [2], seed=1)
    drawn.params = SamplingParams(temperature=1.0)
    runner.submit(Batch(1, (Work(penalized, 0, 3, True), Work(drawn, 0, 3, True))))
    assert runner.sampling.counts
    assert runner.sampling.keys
    last = request("q", [1, 2], [3])
    runner.submit(Batch(2, (Work(last, 0, 2, True),), released=("p", "d")))
    assert not runner.sampling.counts
    assert not runner.sampling.keys
