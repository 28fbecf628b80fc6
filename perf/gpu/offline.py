"""Measure the engine without a server: requests of 256 tokens in and 128 out at several concurrencies; whether the same
batch gives the same tokens again; and one decode step under other choices of kernels (step.py). Stages of bench.py."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch

from inlaid.checkpoint import QuantSpec
from inlaid.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from inlaid.engine.request import Batch, NewRequest, SamplingParams
from inlaid.kernels.measure import Ceiling
from inlaid.model.spec import ModelSpec
from inlaid.worker.build import Loaded, build_engine
from perf.gpu import Keep
from perf.gpu import step as step_module
from perf.gpu.random_model import spec_of
from perf.gpu.serving import files

DEVICE = "cuda"
PROMPT, OUTPUT = 256, 128
ROWS: Mapping[str, tuple[tuple[int, int, int], ...]] = MappingProxyType({  # (adapters, concurrency, requests)
    "7b": ((0, 1, 3), (1, 1, 3), (32, 1, 3), (32, 16, 48), (0, 64, 512), (32, 64, 512), (64, 64, 512), (0, 256, 1024),
           (32, 256, 1024)),
    "8b": ((0, 1, 3), (32, 1, 3), (0, 64, 512), (32, 64, 512), (32, 256, 1024)),
    "tiny": ((0, 1, 2), (2, 4, 8)),
})  # fmt: skip
CONTEXT = 300  # tokens before a step that is taken apart
STEPS = ((64, 32), (64, 0), (1, 1), (256, 32), (16, 16))  # (rows, adapters) of the steps that are taken apart
RANKS: Mapping[str, tuple[int, ...]] = MappingProxyType(  # of the adapters, in turn
    {"7b": (16,), "8b": (8, 16, 32, 64), "tiny": (16,)}
)


def engine_config(model: Path, max_loras: int, max_rank: int, **changes: Any) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        device=DEVICE,
        dtype="float16" if DEVICE == "cuda" else "float32",
        cache=CacheConfig(gpu_memory_utilization=0.8, enable_prefix_caching=False),
        adapters=AdapterConfig(max_loras=max_loras, max_lora_rank=max_rank),
        scheduler=SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=2048),
        **changes,
    )


def drive(loaded: Loaded, adapters: int, concurrency: int, total: int, vocab: int, seed: int = 0) -> dict[str, Any]:
    """Run a closed loop of `concurrency` requests until `total` are done; return its row."""
    engine, generator = loaded.engine, random.Random(seed)
    names = [f"a{i % adapters}" if adapters else None for i in range(total)]
    generator.shuffle(names)
    sent: dict[str, float] = {}
    seen: dict[str, list[float]] = {}
    begin, issued, running, tokens = time.perf_counter(), 0, 0, 0
    steps: list[float] = []
    while running or issued < total:
        while issued < total and running < concurrency:
            prompt = [generator.randrange(3, vocab) for _ in range(PROMPT)]
            params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
            name = f"{seed}-{issued}"
            engine.add(NewRequest(id=name, prompt=prompt, params=params, adapter=names[issued]))
            sent[name], seen[name] = time.perf_counter(), []
            issued, running = issued + 1, running + 1
        started = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        steps.append(now - started)
        for output in outputs:
            assert output.refusal is None, output.refusal
            tokens += len(output.tokens)
            seen[output.id] += [now] * len(output.tokens)
            running -= output.finish_reason is not None
    wall = time.perf_counter() - begin
    per_token = [(times[-1] - times[0]) / (len(times) - 1) * 1e3 for times in seen.values()]
    first = [(seen[name][0] - sent[name]) * 1e3 for name in seen]
    return {
        "adapters": adapters, "concurrency": concurrency, "requests": total, "output_tokens_per_second": tokens / wall,
        "ms_per_token": mean(per_token), "ttft_ms": mean(first), "ttft_max_ms": max(first),
        "median_step_ms": median(steps) * 1e3,
    }  # fmt: skip


def host_share(loaded: Loaded, adapters: int, concurrency: int, vocab: int) -> dict[str, float]:
    """Return the milliseconds of host work in a step of decodes: schedule, submit, wait and collect, commit."""
    engine = loaded.engine
    parts: dict[str, list[float]] = {"schedule": [], "submit": [], "collect": [], "commit": []}

    def timed(owner: Any, name: str, part: str) -> Any:
        inner = getattr(owner, name)

        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(*args)
            finally:
                parts[part].append((time.perf_counter() - begin) * 1e3)

        setattr(owner, name, call)
        return inner

    inners = [
        (engine.scheduler, "schedule", timed(engine.scheduler, "schedule", "schedule")),
        (engine.scheduler, "commit", timed(engine.scheduler, "commit", "commit")),
        (engine.runner, "submit", timed(engine.runner, "submit", "submit")),
        (engine.runner, "collect", timed(engine.runner, "collect", "collect")),
    ]
    drive(loaded, adapters, concurrency, concurrency, vocab, seed=77)
    for owner, name, inner in inners:
        setattr(owner, name, inner)
    return {part: median(times) for part, times in parts.items()}


def repeats(loaded: Loaded, adapters: int, vocab: int, times: int, count: int = 64) -> dict[str, Any]:
    """Serve the same requests over and over; count the answers that are, token for token, those of the first round.

    A round before the first brings the adapters to the device, which makes other batches; it is reported by itself."""
    engine, generator = loaded.engine, random.Random(11)
    prompts = [[generator.randrange(3, vocab) for _ in range(32)] for _ in range(count)]
    rounds: list[dict[str, list[int]]] = []
    batches: list[list[list[tuple[str, int]]]] = []  # by round and batch: requests and their tokens
    submit = engine.runner.submit

    def noted(batch: Batch) -> Any:
        batches[-1].append([(work.request.id.split("-")[1], work.num_tokens) for work in batch.works])
        return submit(batch)

    for turn in range(times + 1):
        answers: dict[str, list[int]] = {}
        batches.append([])
        for i, prompt in enumerate(prompts):
            name = f"a{i % adapters}" if adapters else None
            params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
            engine.add(NewRequest(id=f"{turn}-{i}", prompt=prompt, params=params, adapter=name))
        with patch.object(engine.runner, "submit", noted):
            while engine.has_work:
                for output in engine.step():
                    answers.setdefault(output.id.split("-")[1], []).extend(output.tokens)
        rounds.append(answers)
    same = [sum(answers[name] == rounds[1][name] for name in answers) for answers in rounds]
    return {
        "requests": len(prompts), "tokens": 32, "repetitions": times - 1,
        "all_equal": sum(one == len(prompts) for one in same[2:]), "fewest_equal": min(same[2:]),
        "in_the_same_batches": sum(one == batches[1] for one in batches[2:]),
        "the_time_before": {"equal": same[0], "in_the_same_batches": batches[0] == batches[1]},
    }  # fmt: skip


def load(shape: str, count: int, **changes: Any) -> tuple[Loaded, ModelSpec]:
    """Build an engine with `count` adapters of the shape; the files are made for all rows at once."""
    model, adapters = files(shape, RANKS[shape], max(count, *(some for some, _, _ in ROWS[shape])))
    adapters = dict(list(adapters.items())[:count])
    config = engine_config(model, max(1, count), max(RANKS[shape]), **changes)
    return build_engine(config, adapters), spec_of(shape)


def run(shape: str, keep: Keep) -> dict[str, Any]:
    """Measure the rows of a shape."""
    count = max(adapters for adapters, _, _ in ROWS[shape])
    begin = time.perf_counter()
    loaded, spec = load(shape, count)
    report: dict[str, Any] = {"shape": shape, "start_s": time.perf_counter() - begin, "rows": []}
    drive(loaded, min(count, 2), 2, 2, spec.vocab_size, seed=99)
    for index, (some, concurrency, total) in enumerate(ROWS[shape]):
        if some:  # rows do not measure an adapter's first load
            drive(loaded, some, min(some, 64), some, spec.vocab_size, seed=1000 + index)
        row = drive(loaded, some, concurrency, total, spec.vocab_size, seed=index)
        report["rows"].append(row)
        keep(report)
        print({key: round(value, 2) for key, value in row.items()}, flush=True)
    report["eager_steps"] = getattr(loaded.engine.runner, "num_eager_steps", None)
    report["host_ms"] = host_share(loaded, min(32, count), 64, spec.vocab_size)
    print(report["host_ms"], flush=True)
    return report


def determinism(shape: str, keep: Keep, times: int = 100) -> dict[str, Any]:
    """Serve the same batch over and over through the whole engine, with adapters and without."""
    loaded, spec = load(shape, 32)
    report: dict[str, Any] = {"shape": shape, "deterministic": EngineConfig().deterministic}
    for some in (32, 0):
        report[f"{some} adapters"] = repeats(loaded, some, spec.vocab_size, times)
        keep(report)
        print(report[f"{some} adapters"], flush=True)
    return report


def variants(shape: str, keep: Keep) -> dict[str, Any]:
    """Time one decode step with each choice of kernels, at several sizes, and profile the shipped choice."""
    loaded, spec = load(shape, 32, enforce_eager=True)
    engine, runner = loaded.engine, step_module.runner_of(loaded.engine)
    quant, mean_rank = QuantSpec(4, 128, True, False), sum(RANKS[shape]) / len(RANKS[shape])
    name = torch.cuda.get_device_name() if runner.device.type == "cuda" else ""
    ceiling = Ceiling.of(name) or Ceiling.measured(runner.device)
    report: dict[str, Any] = {"shape": shape, "ceiling": asdict(ceiling), "steps": []}
    choices = step_module.variants(spec.num_heads != spec.num_kv_heads)
    for seed, (rows, adapters) in enumerate(STEPS):
        names = [f"a{i % adapters}" if adapters else None for i in range(rows)]
        step = step_module.decoding(engine, names, CONTEXT, spec.vocab_size, seed)
        found: dict[str, Any] = {"rows": rows, "adapters": adapters, "context": step.context, "choices": []}
        report["steps"].append(found)
        replay = step_module.replayable(runner, step)
        found["kernels"] = step_module.profile(runner, replay)
        found["floors"] = step_module.floors(spec, quant, step, mean_rank, ceiling)
        found["by_group"] = step_module.by_group(found["kernels"], found["floors"])
        print(rows, adapters, found["by_group"], flush=True)
        for record in step_module.compare(engine, step, choices):
            found["choices"].append(record)
            keep(report)
            print(record, flush=True)
        step_module.leave(engine, rows, seed)
    return report
