"""The engine without a server: requests of 256 tokens in and 128 out, so many at a time; tokens per second, time per
output token, and where the time of a decode step goes. One stage of bench.py for each model shape."""

from __future__ import annotations

import random
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from inlaid.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from inlaid.engine.process import Loaded, build_engine
from inlaid.engine.request import NewRequest, SamplingParams
from perf.gpu.random_model import EVERY_LINEAR, write_adapters, write_model

PROMPT, OUTPUT = 256, 128
ROWS = {  # (adapters, concurrency, requests)
    "7b": [(0, 1, 3), (1, 1, 3), (32, 1, 3), (32, 16, 48), (0, 64, 192), (32, 64, 192), (64, 64, 192), (0, 256, 512),
           (32, 256, 512)],
    "8b": [(0, 1, 3), (32, 1, 3), (0, 64, 192), (32, 64, 192), (32, 256, 512)],
    "tiny": [(0, 1, 2), (2, 4, 8)],
}  # fmt: skip
RANKS = {"7b": (16,), "8b": (8, 16, 32, 64), "tiny": (16,)}  # of the adapters, in turn


def engine_config(model: Path, max_loras: int, max_rank: int, **changes: Any) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        device="cuda",
        dtype="float16",
        cache=CacheConfig(gpu_memory_utilization=0.8, enable_prefix_caching=False),
        adapters=AdapterConfig(max_loras=max_loras, max_lora_rank=max_rank),
        scheduler=SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=2048),
        **changes,
    )


def drive(loaded: Loaded, adapters: int, concurrency: int, total: int, vocab: int, seed: int = 0) -> dict[str, Any]:
    """A closed loop of `concurrency` requests until `total` are done."""
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
            assert output.message is None, output.message
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
    """Milliseconds of host work in a step of decodes, by part: schedule, submit, wait and collect, commit."""
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


def step_profile(loaded: Loaded, adapters: int, concurrency: int, vocab: int, skip: int = 40) -> list[dict[str, Any]]:
    """Microseconds of each kernel in a decode step, the mean over some steps of a full batch."""
    engine, generator = loaded.engine, random.Random(5)
    for i in range(concurrency):
        prompt = [generator.randrange(3, vocab) for _ in range(PROMPT)]
        name = f"a{i % adapters}" if adapters else None
        params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
        engine.add(NewRequest(id=f"p{i}", prompt=prompt, params=params, adapter=name))
    for _ in range(skip + concurrency * PROMPT // 2048):
        engine.step()
    steps = 8
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    while engine.has_work:
        engine.step()
    events = [e for e in profiler.key_averages() if e.device_time_total > 0]
    rows = [
        {"kernel": e.key[:110], "us_per_step": e.device_time_total / steps, "calls_per_step": e.count / steps}
        for e in events
    ]
    return sorted(rows, key=lambda row: -row["us_per_step"])[:24]


def repeats(loaded: Loaded, adapters: int, vocab: int, times: int = 12) -> dict[str, Any]:
    """The same 64 requests over and over: how many answers are, token for token, those of the first time."""
    engine, generator = loaded.engine, random.Random(11)
    prompts = [[generator.randrange(3, vocab) for _ in range(32)] for _ in range(64)]
    rounds = []
    for turn in range(times):
        answers: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            name = f"a{i % adapters}" if adapters else None
            params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
            engine.add(NewRequest(id=f"{turn}-{i}", prompt=prompt, params=params, adapter=name))
        while engine.has_work:
            for output in engine.step():
                answers.setdefault(output.id.split("-")[1], []).extend(output.tokens)
        rounds.append(answers)
    same = [sum(answers[name] == rounds[0][name] for name in answers) for answers in rounds[1:]]
    return {"requests": len(prompts), "tokens": 32, "same_as_first": same}


def run(shape: str, every_linear: bool = False, few: bool = False) -> dict[str, Any]:
    """Build, load, and run the rows of this shape."""
    root = Path(f"/tmp/inlaid-bench/{shape}")
    begin = time.perf_counter()
    spec = write_model(root / "model", shape)
    count = max(adapters for adapters, _, _ in ROWS[shape])
    ranks = RANKS[shape]
    modules = EVERY_LINEAR if every_linear else ("q_proj", "k_proj", "v_proj", "o_proj")
    adapters = write_adapters(root / "adapters", spec, count, ranks, modules)
    written = time.perf_counter()
    loaded = build_engine(engine_config(root / "model", max(1, count), max(ranks)), adapters)
    ready = time.perf_counter()
    report: dict[str, Any] = {"shape": shape, "write_s": written - begin, "start_s": ready - written, "rows": []}
    print(f"{shape}: written in {written - begin:.0f} s, ready in {ready - written:.0f} s", flush=True)
    drive(loaded, min(count, 2), 2, 2, spec.vocab_size, seed=99)
    rows = [row for row in ROWS[shape] if not few or (row[1] in (1, 64) and row[0] != 1)]
    for index, (some, concurrency, total) in enumerate(rows):
        if some:  # the adapters' way to the device is not what these rows are about
            drive(loaded, some, min(some, 64), some, spec.vocab_size, seed=1000 + index)
        row = drive(loaded, some, concurrency, total, spec.vocab_size, seed=index)
        report["rows"].append(row)
        print({key: round(value, 2) for key, value in row.items()}, flush=True)
    report["repeats"] = repeats(loaded, min(32, count), spec.vocab_size)
    print(report["repeats"], flush=True)
    report["eager_steps"] = getattr(loaded.engine.runner, "num_eager_steps", None)
    for name, arguments in {"profile_64": (min(32, count), 64), "profile_1": (1, 1)}.items():
        report[name] = step_profile(loaded, *arguments, spec.vocab_size)
        report[f"host_{name}"] = host_share(loaded, *arguments, spec.vocab_size)
        print(name, report[f"host_{name}"], flush=True)
    return report
