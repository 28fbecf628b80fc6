"""What it costs to have adapters come and go: stages of bench.py named adapters-*.

load         milliseconds to bring one adapter to the device, by rank: from pageable memory, from pinned memory, and
             pipelined (until its first layer group is there, and until all are)
modes        on-demand, pipelined and cpu-assist in turn on one engine, under Poisson arrivals over 512 adapters (Zipf
             0.6, 1.0 and 1.4), and a burst of requests that each name an adapter which is not on the device
modes-cached  the same with every adapter on the device
cliff-mixed  8B: 256 adapters of mixed rank over places for 32, 64 at a time, against 32 adapters over the same places
cliff-slots  8B: 32 to 1,024 adapters of rank 16 over 64 places, 64 at a time, Zipf 1.0
cliff-resident  the same load over 1,000 adapters that are all on the device
crossover    time to the first token of a lone request whose adapter is not there: rank x prompt x cores, on demand,
             pipelined and with the CPU's help; also while something else keeps the bus busy. Modes are measured as they
             are: nothing is waited for whole because that would be quicker (`patience` of kernels/arriving.py)

Adapters are made in memory. A few sets of random weights are shared by adapters whose identities differ, so each is
loaded on its own into pages of its own. Without a GPU they run on the CPU; tests do so with a tiny shape.

512 adapters of rank 64 on q, k and v of a 7B are 48 GiB. On a card of 80 GB, of which an engine takes 0.85, weights,
buffers and they leave 14 GiB for KV: 29,000 tokens. Requests have 285 on average and up to 1,133, and any 64 of them
that arrive in a row need 21,300 at their longest, so that no request waits for KV.
`python -m perf.gpu.adapters plot FOLDER` draws the cliff from a folder of results.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from inlaid.adapters.loader import CudaLane, Loader, StreamLoader
from inlaid.adapters.peft import Adapter, lay_out
from inlaid.adapters.store import CACHED, CPU_ASSIST, ON_DEMAND, PIPELINED, AdapterStore
from inlaid.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.kernels.assist import Assistant, Profile
from inlaid.kernels.backend import MODULES
from inlaid.model.spec import ModelSpec, spec_from_config
from inlaid.worker.build import Loaded, build_engine
from perf.gpu import ROOT
from perf.gpu.random_model import ATTENTION, EVERY_LINEAR, config, write_model

SETS = 8  # of random weights that adapters share
MODES = (ON_DEMAND, PIPELINED, CPU_ASSIST)  # that one engine measures in turn
QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Size:
    """How large a stage is."""

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


Keep = Callable[[dict[str, Any]], None]


def nothing(report: dict[str, Any]) -> None: ...


LOAD_RANKS = (8, 16, 32, 64, 128)
MODES_7B = Size("7b", 512, 64, (64,), QKV)
MIXED_8B = Size("8b", 256, 32, (8, 16, 32, 64), prompt=256, output=128)
SLOTS_8B = Size("8b", 1024, 64, (16,), prompt=256, output=128)
CROSSOVER_7B = Size("7b", 1, 2, (16, 64, 128), EVERY_LINEAR)
PROMPTS = (16, 256, 1024)
CORES = (2, 8, 14)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_adapters(spec: ModelSpec, count: int, ranks: Sequence[int], modules: Sequence[str]) -> Iterator[Adapter]:
    """Adapters whose ranks take turns. After `SETS` of them weights come again, identities never."""
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


# load


def load(
    keep: Keep = nothing, ranks: Sequence[int] = LOAD_RANKS, shape: str = "7b", repeats: int = 9
) -> dict[str, Any]:
    spec, on = spec_from_config(config(shape)), device()
    report: dict[str, Any] = {"shape": shape, "modules": ATTENTION, "pinned": on.type == "cuda", "rows": []}
    for rank in ranks:
        (adapter,) = make_adapters(spec, 1, (rank,), ATTENTION)
        flat, size = adapter.flat, adapter.flat.numel()
        store = AdapterStore(
            spec, 1, size, on, flat.dtype, mode=PIPELINED,
            loader=StreamLoader(CudaLane(on)) if on.type == "cuda" else Loader(),
        )  # fmt: skip
        pageable, pool = flat.clone(), store.pages.pool
        row = {"rank": rank, "mib": flat.nbytes / 2**20}
        row["pageable_ms"] = _times(partial(pool.copy_, pageable), repeats)
        row["pinned_ms"] = _times(partial(pool.copy_, flat, non_blocking=True), repeats)
        first, whole = zip(*(_arrive(store, adapter) for _ in range(repeats)), strict=True)
        row |= {"pipelined_first_group_ms": median(first), "pipelined_ms": median(whole)}
        _add(report, row, keep)
    return report


def _times(work: Callable[[], object], repeats: int) -> float:
    """Median milliseconds."""
    times = []
    for _ in range(repeats):
        _synchronize()
        begin = time.perf_counter()
        work()
        _synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return median(times)


def _arrive(store: AdapterStore, adapter: Adapter) -> tuple[float, float]:
    """Milliseconds from asking for it to its first layer group and to its last."""
    _synchronize()
    begin, first = time.perf_counter(), 0.0
    identity = store.add("a", adapter)
    store.want(identity)
    slot = store.slot(identity)
    while not store.all_landed(slot):
        if not first and store.landed(slot, 0):
            first = time.perf_counter()
    end = time.perf_counter()
    store.remove("a")
    return ((first or end) - begin) * 1e3, (end - begin) * 1e3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# An engine with adapters made in memory.


def start(size: Size, mode: str, places: int, room: int, workers: int = 0) -> Loaded:
    """`room`: elements of the adapter pool."""
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
                adapter_workers=workers,
            ),
            scheduler=SchedulerConfig(max_num_seqs=256 if on.type == "cuda" else 8, max_num_batched_tokens=2048),
        ),
        {},
    )


def store_of(loaded: Loaded) -> AdapterStore:
    store: AdapterStore = loaded.engine.runner.adapters  # type: ignore[attr-defined]
    return store


def pool_for(size: Size, places: int) -> int:
    """Elements for so many adapters, of each rank equally many."""
    spec = spec_from_config(config(size.shape))
    of_rank = [next(make_adapters(spec, 1, (rank,), size.modules)).flat.numel() for rank in size.ranks]
    return -(-places * sum(of_rank) // len(of_rank)) + max(of_rank)


def install(loaded: Loaded, size: Size, count: int) -> None:
    """In place of those that are there."""
    empty(loaded)
    store, spec = store_of(loaded), spec_from_config(config(size.shape))
    for number, adapter in enumerate(make_adapters(spec, count, size.ranks, size.modules)):
        store.add(f"a{number}", adapter)


def empty(loaded: Loaded) -> None:
    """No adapter is known, nor on the device."""
    engine, store = loaded.engine, store_of(loaded)
    while engine.has_work:  # a step that nobody waits for any more may hold adapters
        engine.step()
    engine.step()
    for name in store.names():
        store.remove(name)
    assert not store.resident(), "an idle engine holds no adapter"


def switch(loaded: Loaded, mode: str, helpers: Assistant | None) -> None:
    """As if the engine, which is idle and was started with cpu-assist, had been started with this mode: what the store
    waits for, whether steps ask layer by layer, and who computes meanwhile. The copies to a GPU are the same in each;
    without one, on-demand keeps the copying thread that it would not have."""
    runner: Any = loaded.engine.runner
    arriving = _arriving(loaded)
    store_of(loaded).mode = mode
    arriving.assistant = helpers if mode == CPU_ASSIST else None
    runner.arriving, runner.set_aside = (None, arriving) if mode == ON_DEMAND else (arriving, None)


def zipf(count: int, alpha: float, total: int, seed: int) -> list[str]:
    weights = [(rank + 1) ** -alpha for rank in range(count)]
    return [f"a{number}" for number in random.Random(seed).choices(range(count), weights, k=total)]


@dataclass(frozen=True)
class Ask:
    """A request of a load, due at a time; None: as soon as one of those before it is done."""

    adapter: str | None
    prompt: int
    output: int
    due: float | None = None


def serve(loaded: Loaded, asks: Sequence[Ask], vocab: int, concurrency: int = 10**9, seed: int = 0) -> dict[str, Any]:
    """Step until all are answered. Latencies count from when a request was due."""
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
    """Of this process, all threads: the step loop spins, so it counts a whole core in every mode."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def counts(loaded: Loaded) -> dict[str, int]:
    store = store_of(loaded)
    every = [store.counts(store.identity(name) or "") for name in store.names()]
    return {key: sum(getattr(each, key) for each in every) for key in ("loads", "evictions", "hits")}


# modes


def modes(keep: Keep = nothing, size: Size = MODES_7B) -> dict[str, Any]:
    """Each mode begins with nothing on the device."""
    loaded = start(size, CPU_ASSIST, size.places, pool_for(size, size.places))
    helpers = _arriving(loaded).assistant
    report = _about(loaded, size, size.places)
    for mode in MODES:
        switch(loaded, mode, helpers)
        install(loaded, size, size.adapters)
        _mode(report, loaded, size, mode, keep)
    return report


def modes_cached(keep: Keep = nothing, size: Size = MODES_7B) -> dict[str, Any]:
    loaded = start(size, CACHED, size.adapters, pool_for(size, size.adapters))
    install(loaded, size, size.adapters)
    report = _about(loaded, size, size.adapters)
    _mode(report, loaded, size, CACHED, keep)
    return report


def _about(loaded: Loaded, size: Size, places: int) -> dict[str, Any]:
    kv = loaded.model.num_blocks * loaded.model.block_size
    return {"size": vars(size), "places": places, "kv_tokens": kv, "rows": []}


def _mode(report: dict[str, Any], loaded: Loaded, size: Size, mode: str, keep: Keep) -> None:
    vocab = loaded.model.vocab_size
    names = zipf(size.adapters, 1.0, int(size.rate * size.seconds / 5), 99)
    serve(loaded, poisson(size, names, seed=99), vocab, seed=99)
    for number, alpha in enumerate((0.6, 1.0, 1.4)):
        before = counts(loaded)
        names = zipf(size.adapters, alpha, int(size.rate * size.seconds), number)
        found = serve(loaded, poisson(size, names, number), vocab, seed=number)
        row = {"mode": mode, "load": "poisson", "zipf": alpha} | found
        _add(report, row | {key: value - before[key] for key, value in counts(loaded).items()}, keep)
    store = store_of(loaded)
    cold = sorted(store.names(), key=lambda name: store.tier(store.identity(name) or "") == "device")
    asks = [Ask(name, size.prompt, size.output) for name in cold[: size.concurrency]]
    row = {"mode": mode, "load": "burst of cold adapters"}
    _add(report, row | serve(loaded, asks, vocab, seed=7), keep)


def poisson(size: Size, names: Sequence[str], seed: int) -> list[Ask]:
    """Lengths are log-normal around the medians."""
    generator, due, asks = random.Random(seed), 0.0, []
    for name in names:
        due += generator.expovariate(size.rate)
        prompt = min(1024, max(8, int(generator.lognormvariate(0, 0.8) * size.prompt)))
        output = min(512, max(4, int(generator.lognormvariate(0, 0.8) * size.output)))
        asks.append(Ask(name, prompt, output, due))
    return asks


def _add(report: dict[str, Any], row: dict[str, Any], keep: Keep) -> None:
    report["rows"].append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    print(report["rows"][-1], flush=True)
    keep(report)


# cliff


def closed(size: Size, names: Sequence[str]) -> list[Ask]:
    return [Ask(name, size.prompt, size.output) for name in names]


def cliff_mixed(keep: Keep = nothing, size: Size = MIXED_8B) -> dict[str, Any]:
    """vLLM 0.26.0 on an H200: 930 tokens a second and a mean TTFT of 3.3 s (256 over 32), 1,780 (32 over 32)."""
    loaded = start(size, ON_DEMAND, size.places, pool_for(size, size.places))
    install(loaded, size, size.adapters)
    report: dict[str, Any] = {"size": vars(size), "rows": []}
    total = 3 * size.concurrency
    for adapters in (size.places, size.adapters):
        names = [f"a{i % adapters}" for i in range(max(total, adapters))]
        random.Random(adapters).shuffle(names)
        _measured(report, loaded, size, names, {"adapters": adapters, "places": size.places}, keep)
    return report


def cliff_slots(keep: Keep = nothing, size: Size = SLOTS_8B, extra: Sequence[int] = (1000,)) -> dict[str, Any]:
    loaded = start(size, ON_DEMAND, size.places, pool_for(size, size.places))
    install(loaded, size, size.adapters)
    report: dict[str, Any] = {"size": vars(size), "rows": []}
    every = [size.places * 2**step // 2 for step in range(12) if size.places * 2**step // 2 <= size.adapters]
    for adapters in (*every, *extra):
        names = zipf(adapters, 1.0, 3 * size.concurrency, adapters)
        _measured(report, loaded, size, names, {"adapters": adapters, "places": size.places}, keep)
    return report


def cliff_resident(keep: Keep = nothing, size: Size = SLOTS_8B, adapters: int = 1000) -> dict[str, Any]:
    loaded = start(size, "cached", adapters, pool_for(size, adapters))
    install(loaded, size, adapters)
    report: dict[str, Any] = {"size": vars(size), "rows": []}
    names = zipf(adapters, 1.0, 3 * size.concurrency, adapters)
    _measured(report, loaded, size, names, {"adapters": adapters, "places": adapters}, keep)
    return report


def _measured(
    report: dict[str, Any], loaded: Loaded, size: Size, names: Sequence[str], row: dict[str, Any], keep: Keep
) -> None:
    """After each adapter that finds a place has been asked for once, unmeasured."""
    vocab = loaded.model.vocab_size
    first = closed(size, list(dict.fromkeys(names))[: row["places"]])
    serve(loaded, first, vocab, size.concurrency, seed=1000 + len(report["rows"]))
    before = counts(loaded)
    found = serve(loaded, closed(size, names), vocab, size.concurrency, seed=len(report["rows"]))
    _add(report, row | found | {key: value - before[key] for key, value in counts(loaded).items()}, keep)


# crossover


def crossover(
    keep: Keep = nothing,
    size: Size = CROSSOVER_7B,
    prompts: Sequence[int] = PROMPTS,
    cores: Sequence[int] = (),
    repeats: int = 3,
) -> dict[str, Any]:
    available = len(os.sched_getaffinity(0))
    cores = cores or [count for count in CORES if count <= available] or [1]
    largest = replace(size, ranks=(max(size.ranks),))
    loaded = start(largest, CPU_ASSIST, size.places, pool_for(largest, size.places))
    measured: Assistant = _arriving(loaded).assistant
    patience, _arriving(loaded).patience = _arriving(loaded).patience, 0.0
    ways: list[tuple[str, int]] = [(ON_DEMAND, 0), (PIPELINED, 0), *((CPU_ASSIST, count) for count in cores)]
    report: dict[str, Any] = {"size": vars(size), "rows_per_worker": measured.profile.rows_per_worker, "rows": []}
    report["patience_ms"] = patience * 1e3
    helpers = {count: Assistant(measured.ferry, Profile(count, measured.profile.rows_per_worker)) for count in cores}
    spec = spec_from_config(config(size.shape))
    for busy in (False, True):
        with bus_traffic(busy):
            for rank in size.ranks:
                (adapter,) = make_adapters(spec, 1, (rank,), size.modules)
                for prompt in prompts:
                    row: dict[str, Any] = {"bus_busy": busy, "rank": rank, "prompt": prompt}
                    for mode, count in ways:
                        switch(loaded, mode, helpers.get(count))
                        name = f"{mode}-{count}-cores" if count else mode
                        row[f"{name}_ms"] = median(_cold(loaded, adapter, prompt, n) for n in range(repeats))
                    _add(report, row, keep)
    report["cpu_assist_wins"] = _wins(report["rows"])
    return report


def _arriving(loaded: Loaded) -> Any:
    runner: Any = loaded.engine.runner
    return runner.arriving or runner.set_aside


def _cold(loaded: Loaded, adapter: Adapter, prompt: int, number: int) -> float:
    """Milliseconds to the first token of a request whose adapter has to come first."""
    store_of(loaded).add("cold", adapter)
    found = serve(loaded, [Ask("cold", prompt, 2)], loaded.model.vocab_size, seed=number)
    store_of(loaded).remove("cold")
    return float(found["ttft_mean_ms"])


def _wins(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where the CPU's help, with any number of cores, is faster than the better of the other two."""
    won = []
    for row in rows:
        helped = min(value for key, value in row.items() if key.startswith(CPU_ASSIST))
        if helped < min(row[f"{ON_DEMAND}_ms"], row[f"{PIPELINED}_ms"]):
            won.append({key: row[key] for key in ("bus_busy", "rank", "prompt")})
    return won


@contextmanager
def bus_traffic(wanted: bool) -> Iterator[None]:
    """Copies from pinned memory that never end, on a stream and a thread of their own."""
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


STAGES: dict[str, Callable[[Keep], dict[str, Any]]] = {
    "adapters-load": load,
    "adapters-modes": modes,
    "adapters-modes-cached": modes_cached,
    "adapters-cliff-mixed": cliff_mixed,
    "adapters-cliff-slots": cliff_slots,
    "adapters-cliff-resident": cliff_resident,
    "adapters-crossover": crossover,
}


def run(stage: str, keep: Keep) -> dict[str, Any]:
    """`keep` writes what there is so far."""
    return STAGES[stage](keep)


def plot(folder: Path) -> Path:
    """TTFT and throughput against adapters per place, from what cliff-slots and cliff-resident left there."""
    from perf.plots import cliff

    rows = json.loads((folder / "adapters-cliff-slots.json").read_text())["result"]["rows"]
    resident = folder / "adapters-cliff-resident.json"
    best = json.loads(resident.read_text())["result"]["rows"][0] if resident.exists() else None
    target = folder / "adapters-cliff.png"
    target.write_bytes(cliff(rows, best))
    return target


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="perf.gpu.adapters", description="Draw the cliff from a folder of results.")
    parser.add_argument("what", choices=["plot"])
    parser.add_argument("folder", type=Path)
    print(plot(parser.parse_args(argv).folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
