"""The GPU's runner, one step ahead of the host, against transformers and peft. Without a GPU its kernels run in
Triton's interpreter, step by step; graphs and streams need the real thing."""

from __future__ import annotations

import sys
import warnings
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from inlaid.adapters.base import BaseLinears
from inlaid.adapters.loader import CudaLane, StreamLoader
from inlaid.adapters.modes import CACHED, MODES, PIPELINED
from inlaid.adapters.peft import read_adapter
from inlaid.adapters.store import AdapterStore
from inlaid.checkpoint import Checkpoint
from inlaid.config import AdapterConfig, CacheConfig, ConfigError, EngineConfig, SchedulerConfig, SpeculationConfig
from inlaid.engine.engine import Engine, make_engine
from inlaid.engine.request import FinishReason, NewRequest
from inlaid.kernels import attention_triton, fused_triton, lora_triton
from inlaid.kernels.arriving import Arriving
from inlaid.kernels.backend import Parts
from inlaid.kernels.context import ALL_ADAPTERS, ATTENTION_ADAPTERS, NO_ADAPTERS
from inlaid.kernels.cpu import DenseLinear, DensePacked, cpu_kernels
from inlaid.layers import linear
from inlaid.model.spec import read_spec
from inlaid.model.transformer import Transformer
from inlaid.model.weights import load
from inlaid.runner.base_weights import kind, kinds
from inlaid.runner.cuda_kernels import cuda_kernels
from inlaid.runner.cuda_runner import CudaRunner
from inlaid.runner.graphs import Graphs
from inlaid.runner.model_runner import ModelRunner
from tests.adapters.fake_lane import FakeLane
from tests.oracle.oracle import (
    Answer,
    Judge,
    adapter_settings,
    ask,
    family_config,
    prompts,
    save_adapter,
    save_model,
    serve,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = (8, 6) if torch.cuda.is_available() else (4, 3)  # requests, tokens
MANY_STEPS = pytest.mark.skipif(DEVICE.type == "cpu", reason="takes minutes in Triton's interpreter; runs on a GPU")
LONGEST = 30 if torch.cuda.is_available() else 16
POISON = 100  # a token that only one test has
NEAR_TIE = 0.03  # in half precision two tokens this close may change places


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch few programs: the interpreter takes milliseconds for each. Many programs are tested with the kernels."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(attention_triton, "num_splits", lambda sequences, kv_heads: 1)
        few = lora_triton.Tuning(parts=1, block_k=128, block_n=256)
        monkeypatch.setattr(lora_triton, "tuning_for", lambda rows, block_rows, max_rank: few)
        monkeypatch.setattr(linear, "PENDING_ROWS", 8)  # decodes leave their expansions pending, prompts do not


def tiny(family: str) -> Any:
    config = family_config(family)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return config


class Bench:
    """A tiny model, three adapters, and an engine around the runner under test."""

    def __init__(self, root: Path, family: str) -> None:
        self.model = root / "model"
        save_model(self.model, tiny(family))
        self.adapters = {f"a{i}": root / f"a{i}" for i in range(3)}
        for i, folder in enumerate(self.adapters.values()):
            save_adapter(folder, self.model, seed=i, **adapter_settings(i))
        self.judge = Judge(self.model, self.adapters)

    def engine(
        self,
        on_gpu: bool = True,
        store: AdapterStore | None = None,
        arriving: Arriving | None = None,
        cache: dict[str, Any] | None = None,
        speculation: SpeculationConfig | None = None,
        **scheduler: Any,
    ) -> tuple[Engine, ModelRunner | CudaRunner]:
        config = EngineConfig(
            model=str(self.model),
            speculation=speculation or SpeculationConfig(),
            cache=CacheConfig(block_size=4, num_blocks=300, **(cache or {})),
            adapters=AdapterConfig(max_loras=4, max_lora_rank=16, adapter_timeout=1e9),
            scheduler=SchedulerConfig(**{"max_num_seqs": 6, "max_num_batched_tokens": 24, **scheduler}),
            linear_backend="reference",
        )
        spec = read_spec(self.model)
        store = store or AdapterStore(spec, 4, 1 << 20, DEVICE, torch.float16)
        kernels = cuda_kernels(config, store.pages) if on_gpu else cpu_kernels(store.pages)
        model = load(Checkpoint(self.model), spec, kernels, DEVICE, torch.float16, 128, progress=False)
        runner: ModelRunner | CudaRunner
        if on_gpu:
            runner = CudaRunner(model, config, DEVICE, torch.float16, 128, store, False, arriving)
        else:
            runner = ModelRunner(model, 300, 4, DEVICE, torch.float16, store)
        ticks = iter(range(10**9))
        engine = make_engine(
            config,
            runner,
            lambda: float(next(ticks)),
            num_blocks=300,
            max_model_len=128,
            adapters=store,
            pool=runner.pool,
        )
        for name, folder in self.adapters.items():
            store.add(name, read_adapter(folder, spec, torch.float16))
        return engine, runner

    def check(self, request: NewRequest, answer: Answer) -> None:
        """Each token is the judge's best or within a near tie of it, with the judge's log probability."""
        assert len(answer.tokens) == request.params.max_tokens
        logprobs = self.judge.logits([*request.prompt, *answer.tokens], request.adapter).log_softmax(-1)
        for place, token in enumerate(answer.tokens):
            row = logprobs[len(request.prompt) - 1 + place]
            assert float(row.max() - row[token]) < NEAR_TIE, f"{request.id}, output {place}"
            if answer.logprobs:
                assert abs(answer.logprobs[place] - float(row[token])) < NEAR_TIE


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("cuda"), "llama-bias")


def mixed(count: int, max_tokens: int = 6, **params: Any) -> list[NewRequest]:
    names = [None, "a0", "a1", "a2"]
    return [
        ask(f"r{i}", prompt, names[i % 4], max_tokens=max_tokens, **{"logprobs": None, **params})
        for i, prompt in enumerate(prompts(count, seed=1, longest=LONGEST))
    ]


def test_mixed_adapters_chunked_prompts_and_decodes(bench: Bench) -> None:
    engine, runner = bench.engine()
    assert runner.overlap
    requests = mixed(*SIZE)
    answers = serve(engine, requests)
    for request in requests:
        bench.check(request, answers[request.id])


def test_adapters_of_the_embedding_and_the_head(bench: Bench, tmp_path: Path) -> None:
    """Trained tokens, and LoRA factors of both, beside a plain adapter: steps with them run kernel by kernel."""
    engine, runner = bench.engine()
    assert runner.adapters is not None
    kinds: dict[str, dict[str, Any]] = {
        "factors": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
    }
    judges = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a tied head that is adapted alone
        for name, settings in kinds.items():
            save_adapter(tmp_path / name, bench.model, seed=5, r=4, **settings)
            base = BaseLinears(bench.model, scales_outputs=False)
            runner.adapters.add(name, read_adapter(tmp_path / name, read_spec(bench.model), torch.float16, base=base))
            judges[name] = Judge(bench.model, {name: tmp_path / name})
    prompt = [5, 9, 7, 30]
    requests = [ask(name, prompt, name, max_tokens=2, logprobs=None) for name in (*kinds, "a0")]
    answers = serve(engine, requests)
    for request in requests:
        judge = judges.get(request.id, bench.judge)
        logits = judge.logits([*prompt, *answers[request.id].tokens], request.id)
        for place, token in enumerate(answers[request.id].tokens):
            row = logits[len(prompt) - 1 + place]
            assert float(row.max() - row[token]) < NEAR_TIE * max(1.0, float(row.abs().max())), request.id
    assert isinstance(runner, CudaRunner)
    assert runner.num_eager_steps > 0


def test_tokens_are_the_same_in_unified_memory(bench: Bench) -> None:
    """Adapters have room for one, and the lane brings the others into blocks that were KV's."""
    spec, floor = read_spec(bench.model), read_adapter(bench.adapters["a2"], read_spec(bench.model), torch.float16)
    lane = CudaLane(DEVICE) if DEVICE.type == "cuda" else FakeLane(patience=6)
    store = AdapterStore(spec, 3, floor.flat.numel(), DEVICE, torch.float16, loader=StreamLoader(lane), shared=True)
    engine, runner = bench.engine(store=store, cache={"unified_memory": True})
    assert runner.stride == 2 * spec.num_layers
    requests = mixed(4, max_tokens=3)
    answers = serve(engine, requests)
    for request in requests:
        bench.check(request, answers[request.id])
    store.check()
    assert engine.scheduler.pool.num_lent > 0


LONG_ON_CPU = pytest.mark.long if DEVICE.type == "cpu" else pytest.mark.gpu  # twenty seconds each in the interpreter


@pytest.mark.parametrize(
    ("mode", "patient"),
    [
        *(pytest.param(mode, False, marks=() if mode == PIPELINED else LONG_ON_CPU) for mode in MODES),
        pytest.param(PIPELINED, True, marks=LONG_ON_CPU),
    ],
)
def test_adapters_that_are_still_coming(bench: Bench, mode: str, patient: bool) -> None:
    """Tokens are the same in every mode: prompts start before their adapters are whole, on the lane of a device or
    of a test, and what has not landed is waited for there; or, where that would take longer, the step waits for the
    whole."""
    spec, fake = read_spec(bench.model), FakeLane(patience=30)
    lane = CudaLane(DEVICE) if DEVICE.type == "cuda" else fake
    store = AdapterStore(
        spec, 3 if mode == CACHED else 2, 1 << 20, DEVICE, torch.float16, mode=mode, loader=StreamLoader(lane)
    )
    arriving = None
    if mode == PIPELINED:
        arriving = Arriving(store, spec.num_layers, lambda count: count * 1e-9)
    engine, _ = bench.engine(store=store, arriving=arriving)
    if arriving is not None:
        arriving.patience = 1.0 if patient else 0.0
    requests = mixed(4, max_tokens=3)
    answers = serve(engine, requests)
    for request in requests:
        bench.check(request, answers[request.id])
    store.check()
    if DEVICE.type == "cpu":
        assert (fake.num_waits > 0) == (mode == PIPELINED), "decodes wait for the whole"


@MANY_STEPS
@pytest.mark.parametrize("family", ["qwen3", "mistral", "llama-tied"])
def test_families(family: str, tmp_path: Path) -> None:
    """Per-head norms, a sliding window, a shared head."""
    bench = Bench(tmp_path, family)
    engine, _ = bench.engine()
    requests = mixed(3, max_tokens=5)
    answers = serve(engine, requests)
    for request in requests:
        bench.check(request, answers[request.id])


def test_what_the_kernels_do_not_sample(bench: Bench) -> None:
    """Log probabilities, penalties (which must count the token in flight) and bans, beside plain rows."""
    plain = mixed(1, max_tokens=3)
    special = [
        ask("logprobs", [5, 6, 7, 8, 9], "a1", max_tokens=3, logprobs=2),
        ask("prompt", [9, 8, 7, 6, 5, 4, 3], None, max_tokens=2, logprobs=0, prompt_logprobs=0),
    ]
    repeated = ask("penalty", [3, 3, 3], None, max_tokens=4, logprobs=None, frequency_penalty=2.0)
    banned = ask("bias", [3, 4], None, max_tokens=2, logprobs=None, logit_bias={11: 100.0})
    said = serve(bench.engine(on_gpu=False)[0], [ask("free", [3, 4], None, max_tokens=4, logprobs=None)])["free"].tokens
    unsaid = ask("words", [3, 4], None, max_tokens=4, logprobs=None, bad_words=(tuple(said[1:3]),))
    few = ask("few", [3, 4], None, max_tokens=4, logprobs=None, allowed_token_ids=(12, 13, 14))
    engine, _ = bench.engine()
    answers = serve(engine, [*plain, *special, repeated, banned, unsaid, few])
    for request in [*plain, *special]:
        bench.check(request, answers[request.id])
    assert answers["prompt"].prompt_logprobs[0] is None
    assert len(answers["prompt"].prompt_logprobs) == 7
    assert answers["bias"].tokens == [11] * 2
    host, _ = bench.engine(on_gpu=False)
    assert serve(host, [repeated])["penalty"].tokens == answers["penalty"].tokens
    assert serve(host, [unsaid])["words"].tokens == answers["words"].tokens
    assert answers["words"].tokens[:2] == said[:2]
    assert answers["words"].tokens[2] != said[2]
    assert set(answers["few"].tokens) <= {12, 13, 14}
    assert serve(host, [few])["few"].tokens == answers["few"].tokens


def test_a_row_that_is_not_finite_ends_alone(bench: Bench) -> None:
    """A token whose embedding is not finite stands for an overflow. The step behind it, which goes on with a token that
    there is not, is computed again without it."""
    engine, runner = bench.engine()
    runner.model.embedding.weight_VD[POISON] = float("nan")
    good = ask("good", [5, 6, 7], None, max_tokens=3, logprobs=None)
    engine.add(ask("bad", [8, POISON, 9], None, max_tokens=3, logprobs=None))
    engine.add(good)
    answer, ended = Answer([], [], [], 0), []
    while engine.has_work:
        for output in engine.step():
            if output.id == "good":
                answer.tokens += output.tokens
            else:
                ended.append(output)
    assert [(output.tokens, output.finish_reason) for output in ended] == [([], FinishReason.ERROR)]
    assert ended[0].refusal is not None
    assert "not finite" in ended[0].refusal.message
    bench.check(good, answer)
    engine.scheduler.check_whole()


@MANY_STEPS
def test_draws_do_not_depend_on_the_batch(bench: Bench) -> None:
    engine, _ = bench.engine()
    requests = [
        replace_params(request, temperature=1.0, top_p=0.9, top_k=20, seed=i) for i, request in enumerate(mixed(5))
    ]
    together = serve(engine, requests)
    alone, _ = bench.engine(max_num_seqs=2)
    for request in requests[1:3]:
        assert serve(alone, [request])[request.id].tokens == together[request.id].tokens


def replace_params(request: NewRequest, **changes: Any) -> NewRequest:
    import msgspec

    return msgspec.structs.replace(request, params=msgspec.structs.replace(request.params, **changes))


@MANY_STEPS
def test_rows_and_tables_are_reused_cleanly(bench: Bench) -> None:
    """More requests than rows, prefixes from the cache, and preemption for lack of blocks."""
    engine, runner = bench.engine(max_num_seqs=3)
    shared = prompts(1, seed=9, longest=30)[0] + [2] * 12
    requests = [ask(f"s{i}", [*shared, i + 3], "a0", max_tokens=6, logprobs=None) for i in range(6)]
    answers = serve(engine, requests)
    for request in requests:
        bench.check(request, answers[request.id])
    assert any(answer.num_cached for answer in answers.values())
    assert isinstance(runner, CudaRunner)
    engine.step()
    assert len(runner.rows.free) + len(runner.rows.of) == 3


def test_blocks_of_each_kind_and_the_last_need_every_kernel(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six blocks, the fourth with a window of its own: whatever is called for all of them, with whatever shapes and
    settings, is called for three."""
    _, runner = bench.engine()
    assert isinstance(runner, CudaRunner)
    model, calls = runner.model, set[Any]()
    first, last = model.blocks
    attention = copy(first.attention)
    attention.window = 7
    other = replace(first, attention=attention)
    model.blocks = [first, first, first, other, first, last]
    runner.step.cache = [runner.step.cache[0]] * 6
    assert kinds(model) == [0, 3, 5]

    def note(owner: Any, name: str) -> None:
        """Note calls instead of making them: what they compute is of no interest, and the interpreter is slow."""

        def noted(*args: Any, **more: Any) -> None:
            calls.add((name, kind(args), kind(tuple(sorted(more.items())))))

        monkeypatch.setattr(owner, name, noted)

    for name in ("norm", "embed_norm", "rope_store", "silu_mul"):
        note(fused_triton, name)
    for name in ("shrink", "expand_add"):
        note(lora_triton, name)
    for name in ("decode", "prefill", "gather_tables"):
        note(attention_triton, name)
    note(type(first.attention.qkv.parts[0][0]), "gemm")
    for layout in (runner.layouts.decodes(2), runner.layouts.prompts(8)):
        for level in (NO_ADAPTERS, ATTENTION_ADAPTERS, ALL_ADAPTERS):
            calls.clear()
            runner.graphs.idle_step(layout, level)
            everything = set(calls)
            calls.clear()
            runner.graphs.idle_step(layout, level, [0, 5])
            assert calls < everything  # the window's kernels
            runner.graphs.idle_step(layout, level, kinds(model))
            assert calls == everything


class Offering(DenseLinear):
    """A backend that offers products of up to `most` rows in parts, of each tile two or three."""

    def __init__(self, most: int) -> None:
        self.most, self.num_in_parts = most, 0

    def parts(self, packed: DensePacked, rows: int) -> Parts | None:
        if rows > self.most:
            return None
        across = packed.out_features // 32
        counts = torch.arange(-(-rows // 4) * across, dtype=torch.int32, device=DEVICE) % 2 + 2
        return Parts(counts.view(-1, across), 3, 4, 32)

    def gemm_in_parts(self, x_TK: torch.Tensor, packed: DensePacked, out_PTN: torch.Tensor) -> None:
        """Halves and quarters, which add up to the whole to the bit; what a tile has not is not a number."""
        self.num_in_parts += 1
        parts = self.parts(packed, x_TK.shape[0])
        assert parts is not None
        two = parts.counts.repeat_interleave(4, 0)[: x_TK.shape[0]].repeat_interleave(32, 1) == 2
        whole = x_TK @ packed.weight_KN
        out_PTN[0] = whole / 2
        out_PTN[1] = whole / 2 - torch.where(two, 0, whole / 4)
        out_PTN[2] = torch.where(two, torch.nan, whole / 4)


@pytest.mark.parametrize("most", [2, pytest.param(256, marks=LONG_ON_CPU)])
def test_linears_before_a_norm_may_leave_parts(bench: Bench, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of some numbers of rows, or of all, are split; with biases, adapters at once and pending, log
    probabilities of a prompt, and the last block's product before the head."""
    prompt = ask("prompt", [9, 8, 7, 6, 5, 4, 3], "a1", max_tokens=2, logprobs=1, prompt_logprobs=0)
    requests = [*mixed(2, max_tokens=2, logprobs=1), prompt]
    whole = serve(bench.engine(on_gpu=DEVICE.type == "cuda")[0], requests)  # the interpreter takes seconds for it
    real, offering = load, Offering(most)

    def loaded(*given: Any, **more: Any) -> Any:
        model = real(*given, **more)
        for block in model.blocks:
            for projection in (block.attention.output, block.down):
                projection.parts = tuple((offering, packed) for _, packed in projection.parts)
        return model

    monkeypatch.setattr(sys.modules[__name__], "load", loaded)
    engine, runner = bench.engine()
    assert isinstance(runner, CudaRunner)
    assert runner.step.workspace.room("parts") == 3 * min(most, 24) * runner.model.spec.hidden_size
    in_parts = serve(engine, requests)
    assert offering.num_in_parts > 0
    for request in requests:
        bench.check(request, in_parts[request.id])
        assert in_parts[request.id].logprobs == pytest.approx(whole[request.id].logprobs, abs=NEAR_TIE / 3)
    said, expected = in_parts["prompt"].prompt_logprobs[1:], whole["prompt"].prompt_logprobs[1:]
    assert said == pytest.approx(expected, abs=NEAR_TIE / 3)


def test_steps_run_the_transformer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start-up, what graphs capture, and steps without a graph all run `Transformer.forward`."""
    engine, runner = bench.engine()
    assert isinstance(runner, CudaRunner)

    def broken(*given: Any, **more: Any) -> Any:
        raise RuntimeError("no transformer")

    monkeypatch.setattr(Transformer, "forward", broken)
    graphs = Graphs(runner.step, runner.layouts, [runner.layouts.decodes(1)], progress=False)
    for start in (graphs.compile_kernels, lambda: runner.step.run(runner.layouts.decodes(1), NO_ADAPTERS)):
        with pytest.raises(RuntimeError, match="no transformer"):
            start()
    with pytest.raises(AssertionError, match="no transformer"):
        serve(engine, [ask("prompt", [9, 8, 7], None, max_tokens=1, prompt_logprobs=0)])  # on a GPU: without a graph


def test_unknown_attention_is_refused() -> None:
    config = replace(EngineConfig(), attention_backend="reference")
    store = AdapterStore(read_spec_of_demo(), 1, 64, torch.device("cpu"), torch.float16)
    with pytest.raises(ConfigError, match="reference"):
        cuda_kernels(config, store.pages)


def read_spec_of_demo() -> Any:
    from inlaid.model.spec import spec_from_config

    return spec_from_config(family_config("llama").to_dict())
