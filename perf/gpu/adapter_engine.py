"""An engine whose adapters are made in memory, and loads for it. The stages of adapters.py use it.

A few sets of random weights are shared by adapters whose identities differ, so each adapter is loaded on its own into
pages of its own. Without a GPU all of it runs on the CPU; tests do so with a tiny shape.
"""

from __future__ import annotations

import random
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean
from typing import Any

import torch

from inlaid.adapters.adapter import Adapter
from inlaid.adapters.modes import ON_DEMAND
from inlaid.adapters.peft import lay_out
from inlaid.adapters.store import AdapterStore
from inlaid.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.kernels.backend import MODULES
from inlaid.model.spec import ModelSpec, spec_from_config
from inlaid.worker.build import Loaded, build_engine
from perf.gpu import ROOT
from perf.gpu.random_model import ATTENTION, config, write_model

SETS = 8  # of random weights that adapters share


@dataclass(frozen=True)
class Size:
    """The size of a stage: its model, adapters and load."""

    shape: str
    adapters: int
    places: int
    ranks: tuple[int, ...]
    modules: tuple[str, ...] = ATTENTION
    rate: float = 20.0  # requests a second
    seconds: float = 8.0
    prompt: int = 120
    output: int = 90
    concurrency: int = 64


def device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_adapters(spec: ModelSpec, count: int, ranks: Sequence[int], modules: Sequence[str]) -> Iterator[Adapter]:
    """Yield adapters whose ranks take turns. After `SETS` of them weights come again, identities never."""
    on, made = device(), {}
    dtype = torch.float16 if on.type == "cuda" else torch.float32
    for number in range(count):
        rank = ranks[number % len(ranks)]
        key = (rank, number // len(ranks) % max(1, SETS // len(ranks)))
        if key not in made:
            generator = torch.Generator(on).manual_seed(number)
            factors, scales = {}, {}
            for site in range(spec.num_sites):
                if MODULES[site % len(MODULES)] in modules:
                    outputs, inputs = spec.module_shape(MODULES[site % len(MODULES)])
                    a = torch.randn(rank, inputs, generator=generator, device=on) * inputs**-0.5
                    b = torch.randn(outputs, rank, generator=generator, device=on) * 0.01
                    factors[site], scales[site] = (a.to(dtype).cpu(), b.to(dtype).cpu()), 2.0
            made[key] = lay_out("", "", factors, scales, dtype, pin=on.type == "cuda")
        yield replace(made[key], identity=f"random-{number}", path=f"random-{number}")


def start(size: Size, mode: str, places: int, room: int) -> Loaded:
    """Build an engine without adapters; `room` is the elements of its adapter pool."""
    folder, on = ROOT / size.shape / "model", device()
    if not (folder / "tokenizer.json").exists():
        write_model(folder, size.shape)
    itemsize = 2 if on.type == "cuda" else 4
    return build_engine(
        EngineConfig(
            model=str(folder),
            device=on.type,
            dtype="float16" if on.type == "cuda" else "float32",
            cache=CacheConfig(gpu_memory_utilization=0.85, cpu_memory_gib=0.1, enable_prefix_caching=False),
            adapters=AdapterConfig(
                max_loras=places,
                max_lora_rank=max(size.ranks),
                adapter_mode=mode,
                adapter_memory_gib=room * itemsize / 2**30,
            ),
            scheduler=SchedulerConfig(max_num_seqs=256 if on.type == "cuda" else 8, max_num_batched_tokens=2048),
        ),
        {},
    )


def store_of(loaded: Loaded) -> AdapterStore:
    store: AdapterStore = loaded.engine.runner.adapters  # type: ignore[attr-defined]
    return store


def pool_for(size: Size, places: int) -> int:
    """Return the elements that `places` adapters take, of each rank equally many."""
    spec = spec_from_config(config(size.shape))
    of_rank = [next(make_adapters(spec, 1, (rank,), size.modules)).flat.numel() for rank in size.ranks]
    return -(-places * sum(of_rank) // len(of_rank)) + max(of_rank)


def install(loaded: Loaded, size: Size, count: int) -> None:
    """Replace the adapters of an engine by `count` new ones."""
    empty(loaded)
    store, spec = store_of(loaded), spec_from_config(config(size.shape))
    for number, adapter in enumerate(make_adapters(spec, count, size.ranks, size.modules)):
        store.add(f"a{number}", adapter)


def empty(loaded: Loaded) -> None:
    """Remove every adapter from an engine, from its device too."""
    engine, store = loaded.engine, store_of(loaded)
    while engine.has_work:  # a step whose requests are gone may still hold adapters
        engine.step()
    engine.step()
    for name in store.names():
        store.remove(name)
    assert not store.resident(), "an idle engine holds no adapter"


def switch(loaded: Loaded, mode: str) -> None:
    """Make an idle engine, started with pipelined, work as if it had been started with `mode`.

    A mode decides what the store waits for, and whether steps ask layer by layer. The copies to a GPU are the same in
    each; without a GPU, on-demand keeps the copying thread that it would not have."""
    runner: Any = loaded.engine.runner
    arriving = arriving_of(loaded)
    store_of(loaded).switch(mode)
    runner.arriving, runner.set_aside = (None, arriving) if mode == ON_DEMAND else (arriving, None)


def zipf(count: int, alpha: float, total: int, seed: int) -> list[str]:
    """Draw `total` names of `count` adapters, the k-th as often as k^-alpha."""
    weights = [(rank + 1) ** -alpha for rank in range(count)]
    return [f"a{number}" for number in random.Random(seed).choices(range(count), weights, k=total)]


@dataclass(frozen=True)
class Ask:
    """A request of a load, due at a time, or (None) as soon as an earlier request is done."""

    adapter: str | None
    prompt: int
    output: int
    due: float | None = None


def serve(loaded: Loaded, asks: Sequence[Ask], vocab: int, concurrency: int = 10**9, seed: int = 0) -> dict[str, Any]:
    """Step an engine until a load is answered; return its figures. Latencies count from when a request was due."""
    engine, generator, waiting = loaded.engine, random.Random(seed), list(asks)[::-1]
    began: dict[str, float] = {}
    seen: dict[str, list[float]] = {}
    cpu, start_time, running = _cpu_seconds(), time.perf_counter(), 0
    while waiting or running:
        now = time.perf_counter() - start_time
        while waiting and running < concurrency and (waiting[-1].due or 0.0) <= now:
            ask, name = waiting.pop(), f"{seed}-{len(began)}"
            prompt = [generator.randrange(3, vocab) for _ in range(ask.prompt)]
            params = SamplingParams(max_tokens=ask.output, temperature=0.0, ignore_eos=True)
            engine.add(NewRequest(id=name, prompt=prompt, params=params, adapter=ask.adapter))
            began[name], seen[name], running = now if ask.due is None else ask.due, [], running + 1
        for output in engine.step() if running else ():
            assert output.refusal is None, output.refusal
            seen[output.id] += [time.perf_counter() - start_time] * len(output.tokens)
            running -= output.finish_reason is not None
    wall = time.perf_counter() - start_time
    first = [(times[0] - began[name]) * 1e3 for name, times in seen.items()]
    gaps = [(b - a) * 1e3 for times in seen.values() for a, b in pairwise(times)]
    return {
        "requests": len(seen),
        "latency_mean_ms": mean((times[-1] - began[name]) * 1e3 for name, times in seen.items()),
        "output_tokens_per_second": sum(map(len, seen.values())) / wall,
        "ttft_mean_ms": mean(first),
        "ttft_p50_ms": percentile(first, 50),
        "ttft_p99_ms": percentile(first, 99),
        "itl_p50_ms": percentile(gaps, 50),
        "itl_p99_ms": percentile(gaps, 99),
        "cpu_seconds_per_request": (_cpu_seconds() - cpu) / len(seen),
    }


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share / 100))] if ordered else 0.0


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process, all threads. The step loop spins: it counts one core in every mode."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def counts(loaded: Loaded) -> dict[str, int]:
    """Return how often adapters were loaded, evicted and found on the device."""
    store = store_of(loaded)
    every = [store.counts(store.identity(name) or "") for name in store.names()]
    return {key: sum(getattr(each, key) for each in every) for key in ("loads", "evictions", "hits")}


def poisson(size: Size, names: Sequence[str], seed: int) -> list[Ask]:
    """Return requests that arrive at random, with log-normal lengths around the medians of `size`."""
    generator, due, asks = random.Random(seed), 0.0, []
    for name in names:
        due += generator.expovariate(size.rate)
        prompt = min(1024, max(8, int(generator.lognormvariate(0, 0.8) * size.prompt)))
        output = min(512, max(4, int(generator.lognormvariate(0, 0.8) * size.output)))
        asks.append(Ask(name, prompt, output, due))
    return asks


def closed(size: Size, names: Sequence[str]) -> list[Ask]:
    """Return requests that wait for each other, all of one length."""
    return [Ask(name, size.prompt, size.output) for name in names]


@contextmanager
def bus_traffic(wanted: bool) -> Iterator[None]:
    """Copy pinned memory to the device without end while the body runs, on a stream and a thread of its own."""
    if not (wanted and torch.cuda.is_available()):
        yield
        return
    stop = threading.Event()

    def copy() -> None:
        stream = torch.cuda.Stream()
        host = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
        with torch.cuda.stream(stream):
            while not stop.is_set():
                there.copy_(host, non_blocking=True)
                stream.synchronize()

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def arriving_of(loaded: Loaded) -> Any:
    """Return what makes steps wait for arriving adapters, also while `switch` has set it aside."""
    runner: Any = loaded.engine.runner
    return runner.arriving or runner.set_aside
