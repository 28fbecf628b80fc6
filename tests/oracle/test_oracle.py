"""inlaid against transformers + peft, in fp32: equal greedy tokens, log probabilities within 1e-4, however the
requests are batched, chunked, preempted or helped by the prefix cache."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inlaid.adapters.adapter import AdapterError
from inlaid.adapters.peft import read_adapter
from inlaid.engine.request import NewRequest
from tests.cases import spread
from tests.oracle.oracle import (
    FAMILIES,
    Judge,
    adapter_settings,
    add_adapter,
    ask,
    family_config,
    load_engine,
    prompts,
    save_adapter,
    save_adapters,
    save_gptq,
    save_model,
    serve,
)

NUM_KINDS = 7  # of adapters, by `adapter_settings`
NUM_ADAPTERS = 15  # and the base: sixteen requests, sixteen different models


@dataclass
class Case:
    """A model folder, its adapters and the judge over them."""

    model: Path
    adapters: dict[str, Path]
    judge: Judge

    def engine(self, **changes: object) -> tuple:
        engine, loaded = load_engine(self.model, **changes)
        for name, folder in self.adapters.items():
            add_adapter(loaded, name, folder)
        return engine, loaded

    def requests(self, count: int = 16, seed: int = 1, longest: int = 40, **params: object) -> list[NewRequest]:
        """Every adapter in turn, and the base."""
        names = [*self.adapters, None]
        return [
            ask(f"r{index}", prompt, names[index % len(names)], **params)
            for index, prompt in enumerate(prompts(count, seed, longest))
        ]


def make_case(folder: Path, family: str, num_adapters: int = NUM_ADAPTERS) -> Case:
    save_model(folder / "model", family_config(family))
    adapters = {f"a{index}": folder / f"a{index}" for index in range(num_adapters)}
    save_adapters(adapters.values(), folder / "model")
    return Case(folder / "model", adapters, Judge(folder / "model", adapters))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("mistral"), "mistral")


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_of_every_kind_of_adapter_in_one_batch(family: str, tmp_path: Path, long: bool) -> None:
    """Sixteen requests of one family, and one for each kind and the base of the others."""
    num_adapters = NUM_ADAPTERS if long or family == "llama" else NUM_KINDS
    case = make_case(tmp_path, family, num_adapters)
    engine, loaded = case.engine()
    requests = case.requests(num_adapters + 1)
    answers = serve(engine, requests)
    for request in requests:
        case.judge.check(request, answers[request.id])
    loaded.adapters.check()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_equals_its_dequantized_weights(bits: int, act_order: bool, tmp_path: Path) -> None:
    save_model(tmp_path / "model", family_config("qwen2"))
    save_gptq(tmp_path / "gptq", tmp_path / "model", tmp_path / "judged", bits, -1 if bits == 8 else 32, act_order)
    adapters = {"a": tmp_path / "a"}
    save_adapter(adapters["a"], tmp_path / "judged", 1, **adapter_settings(1))
    case = Case(tmp_path / "gptq", adapters, Judge(tmp_path / "judged", adapters))
    engine, loaded = case.engine()
    assert len(loaded.runner.model.blocks[0].attention.qkv.parts) == (3 if act_order and bits != 8 else 1)
    requests = case.requests(6)
    answers = serve(engine, requests)
    for request in requests:
        case.judge.check(request, answers[request.id])


@pytest.mark.parametrize(("budget", "block_size"), spread(product((17, 64, 2048), (1, 4, 16)), every=2))
def test_chunked_prefill_changes_nothing(llama: Case, mistral: Case, budget: int, block_size: int) -> None:
    for case in (llama, mistral):
        engine, _ = case.engine(max_num_batched_tokens=budget, block_size=block_size, num_blocks=900)
        requests = case.requests(longest=80, max_tokens=6)
        answers = serve(engine, requests)
        for request in requests:
            case.judge.check(request, answers[request.id])


def test_without_chunking(llama: Case) -> None:
    engine, _ = llama.engine(enable_chunked_prefill=False, max_num_batched_tokens=64)
    requests = llama.requests(max_tokens=6)
    answers = serve(engine, requests)
    for request in requests:
        llama.judge.check(request, answers[request.id])


def test_preempted_and_resumed(llama: Case) -> None:
    engine, _ = llama.engine(num_blocks=40, prefix=False)
    requests = llama.requests(max_tokens=24)
    answers = serve(engine, requests)
    assert engine.scheduler.num_preemptions > 0
    for request in requests:
        llama.judge.check(request, answers[request.id])


def test_prefix_hits(llama: Case) -> None:
    engine, _ = llama.engine()
    first = llama.requests(longest=60)
    serve(engine, first)
    again = [ask(f"again-{r.id}", [*r.prompt, 5, 6, 7], r.adapter) for r in first]
    answers = serve(engine, again)
    assert sum(answer.num_cached > 0 for answer in answers.values()) > 8
    for request in again:
        llama.judge.check(request, answers[request.id])


def test_prefixes_of_other_adapters_are_not_hits(llama: Case) -> None:
    engine, _ = llama.engine()
    prompt = prompts(1, 3)[0] * 4
    serve(engine, [ask("a0", prompt, "a0")])
    answers = serve(engine, [ask("a1", prompt, "a1"), ask("base", prompt), ask("again", prompt, "a0")])
    assert [answers[name].num_cached > 0 for name in ("a1", "base", "again")] == [False, False, True]
    llama.judge.check(ask("a1", prompt, "a1"), answers["a1"])


def test_alone_and_among_others(llama: Case) -> None:
    engine, _ = llama.engine(prefix=False)
    requests = llama.requests()
    together = serve(engine, requests)
    for request in requests:
        alone = serve(engine, [request])[request.id]
        assert alone.tokens == together[request.id].tokens
        assert alone.logprobs == pytest.approx(together[request.id].logprobs, abs=1e-4)


def test_seeded_draws_do_not_depend_on_the_batch(llama: Case) -> None:
    engine, _ = llama.engine(prefix=False)
    settings = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "frequency_penalty": 0.3}
    requests = [ask(r.id, r.prompt, r.adapter, seed=index, **settings) for index, r in enumerate(llama.requests())]
    together = serve(engine, requests)
    small, _ = llama.engine(num_blocks=40, prefix=False, max_num_batched_tokens=24)
    squeezed = serve(small, requests)
    assert small.scheduler.num_preemptions > 0
    for request in requests:
        assert serve(engine, [request])[request.id].tokens == together[request.id].tokens
        assert squeezed[request.id].tokens == together[request.id].tokens
    other = ask("other", requests[0].prompt, requests[0].adapter, seed=99, **settings)
    assert serve(engine, [other])["other"].tokens != together[requests[0].id].tokens


def test_prompt_logprobs_through_chunks(llama: Case) -> None:
    engine, _ = llama.engine(max_num_batched_tokens=16)
    requests = llama.requests(8, prompt_logprobs=0, max_tokens=2)
    answers = serve(engine, requests)
    for request in requests:
        assert len(answers[request.id].prompt_logprobs) == len(request.prompt)
        llama.judge.check(request, answers[request.id])


def test_generate_of_transformers_agrees(llama: Case) -> None:
    """The judge reads whole texts at once; its own generation loop must say the same."""
    engine, _ = llama.engine()
    request = ask("r", prompts(1, 7)[0], "a1", max_tokens=20)
    answer = serve(engine, [request])["r"]
    llama.judge.model.set_adapter("a1")
    ids = torch.tensor([request.prompt])
    made = llama.judge.model.generate(input_ids=ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert answer.tokens == made[0, len(request.prompt) :].tolist()


def test_more_adapters_than_places(llama: Case) -> None:
    engine, loaded = llama.engine(max_loras=2)
    requests = llama.requests()
    answers = serve(engine, requests)
    for request in requests:
        llama.judge.check(request, answers[request.id])
    assert len(loaded.adapters.resident()) <= 2
    loaded.adapters.check()


def test_a_no_op_adapter_is_refused(llama: Case, tmp_path: Path) -> None:
    tensors = load_file(llama.adapters["a1"] / "adapter_model.safetensors")
    silent = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    save_file(silent, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((llama.adapters["a1"] / "adapter_config.json").read_bytes())
    _, loaded = llama.engine()
    with pytest.raises(AdapterError, match="every B is zero"):
        add_adapter(loaded, "silent", tmp_path)
    assert read_adapter(tmp_path, loaded.spec, loaded.dtype, allow_noop=True).rank == 8


def test_an_adapter_that_is_not_applied_is_caught(llama: Case) -> None:
    """The oracle can fail: an adapter whose scales were lost on the device gives the base's answers."""
    engine, loaded = llama.engine()
    request = llama.requests(2)[1]
    serve(engine, [request])
    loaded.adapters.pages.scale.zero_()
    loaded.adapters.pages.versions[:] = [version + 1 for version in loaded.adapters.pages.versions]
    answer = serve(engine, [ask("again", [*request.prompt], request.adapter)])["again"]
    with pytest.raises(AssertionError, match="the judge says"):
        llama.judge.check(request, answer)
