"""The GPU's runner with keys and values of 8 bits: chunked prompts, decodes, adapters, memory of their own and shared.
Without a GPU its kernels run in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from inlaid.adapters.loader import CudaLane, StreamLoader
from inlaid.adapters.store import AdapterStore
from inlaid.engine.request import NewRequest
from inlaid.model.spec import read_spec
from tests.adapters.fake_lane import FakeLane
from tests.oracle.oracle import Answer, serve
from tests.runner.test_cuda_runner import DEVICE, LONG_ON_CPU, Bench, few_programs, mixed

__all__ = ["few_programs"]  # a fixture that every test here uses
NEAR_TIE = 0.15  # nats: of random weights, with keys and values of 8 bits and sums in half precision


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("kv-codes"), "llama-bias")


def check(bench: Bench, requests: list[NewRequest], answers: dict[str, Answer]) -> None:
    """Each token is the likeliest of transformers and peft in single precision, or within a near tie of it."""
    for request in requests:
        tokens = answers[request.id].tokens
        assert len(tokens) == request.params.max_tokens
        logprobs = bench.judge.logits([*request.prompt, *tokens], request.adapter).log_softmax(-1)
        for place, token in enumerate(tokens):
            row = logprobs[len(request.prompt) - 1 + place]
            assert float(row.max() - row[token]) < NEAR_TIE, f"{request.id}, output {place}"


@pytest.mark.parametrize(("form", "unified"), [("int8", True), pytest.param("fp8", False, marks=LONG_ON_CPU)])
def test_answers(bench: Bench, form: str, unified: bool) -> None:
    spec, store = read_spec(bench.model), None
    cache: dict[str, Any] = {"kv_cache_dtype": form, "unified_memory": unified}
    if unified:
        lane = CudaLane(DEVICE) if DEVICE.type == "cuda" else FakeLane(patience=6)
        store = AdapterStore(spec, 3, 1 << 15, DEVICE, torch.float16, loader=StreamLoader(lane), shared=True)
    engine, runner = bench.engine(store=store, cache=cache)
    assert runner.cache[0].keys.dtype == (torch.int8 if form == "int8" else torch.float8_e4m3fn)
    assert runner.stride == (2 * spec.num_layers + 1 if unified else 1)
    requests = mixed(3, max_tokens=2)
    check(bench, requests, serve(engine, requests))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU: graphs")
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_graphs_give_the_same_tokens_again(bench: Bench, form: str) -> None:
    requests, found = mixed(8, max_tokens=12), []
    for _ in range(2):
        engine, runner = bench.engine(cache={"kv_cache_dtype": form, "enable_prefix_caching": False})
        found.append({name: answer.tokens for name, answer in serve(engine, requests).items()})
        assert len(runner.graphs) > 0
    assert found[0] == found[1]
