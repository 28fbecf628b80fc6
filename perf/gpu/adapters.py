"""Measure what it costs to have adapters come and go: stages of bench.py named adapters-*.

load         milliseconds to bring one adapter to the device, by rank: from pageable memory, from pinned memory, and
             pipelined (until its first layer group is there, and until all are)
modes        on-demand and pipelined in turn on one engine, under Poisson arrivals over 512 adapters (Zipf 0.6, 1.0
             and 1.4), and a burst of requests that each name an adapter which is not on the device
modes-cached  the same with every adapter on the device
toppings     7B: the artifact's client, 60 requests one after another, each for an adapter of rank 64 that is not on the
             device, in each mode; and once more, all on the device
oversubscribed-mixed  8B: 256 adapters of mixed rank over places for 32, 64 at a time, against 32 adapters over the
             same places
oversubscribed-slots  8B: 32 to 1,024 adapters of rank 16 over 64 places, 64 at a time, Zipf 1.0
all-resident  the same load over 1,000 adapters that are all on the device
crossover    time to the first token of a lone request whose adapter is not there: rank x prompt, on demand and
             pipelined; also while other copies keep the bus busy. Every mode is measured as it is: none waits for a
             whole adapter because that would be quicker (`patience` of kernels/arriving.py)

512 adapters of rank 64 on q, k and v of a 7B are 48 GiB. On a card of 80 GB, of which an engine takes 0.85, weights,
buffers and adapters leave 14 GiB for KV: 29,000 tokens. Requests have 285 on average and up to 1,133, and any 64 of
them that arrive in a row need 21,300 at their longest, so that no request waits for KV.
`python -m perf.gpu.adapters plot FOLDER` draws what oversubscription costs from a folder of results.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import torch

from inlaid.adapters.adapter import Adapter
from inlaid.adapters.loader import CudaLane, Loader, StreamLoader
from inlaid.adapters.modes import CACHED, ON_DEMAND, PIPELINED
from inlaid.adapters.store import AdapterStore
from inlaid.flags import Parser
from inlaid.model.spec import spec_from_config
from inlaid.worker.build import Loaded
from perf.assist_map import host_cores, host_gflops
from perf.gpu import Keep
from perf.gpu.adapter_engine import (
    Ask,
    Size,
    arriving_of,
    bus_traffic,
    closed,
    counts,
    device,
    install,
    make_adapters,
    poisson,
    pool_for,
    serve,
    start,
    store_of,
    switch,
    zipf,
)  # fmt: skip
from perf.gpu.random_model import ATTENTION, EVERY_LINEAR, config

MODES = (ON_DEMAND, PIPELINED)  # that one engine measures in turn
QKV = ("q_proj", "k_proj", "v_proj")
LOAD_RANKS = (8, 16, 32, 64, 128)
MODES_7B = Size("7b", 512, 64, (64,), QKV)
TOPPINGS_7B = Size("7b", 63, 64, (64,), QKV, prompt=6, output=32)  # three of the adapters warm up
MIXED_8B = Size("8b", 256, 32, (8, 16, 32, 64), prompt=256, output=128)
SLOTS_8B = Size("8b", 1024, 64, (16,), prompt=256, output=128)
CROSSOVER_7B = Size("7b", 1, 2, (16, 64, 128), EVERY_LINEAR)
PROMPTS = (16, 256, 1024)


def nothing(report: dict[str, Any]) -> None:
    """Keep nothing: for a stage whose caller wants the result only."""


def load(
    keep: Keep = nothing, ranks: Sequence[int] = LOAD_RANKS, shape: str = "7b", repeats: int = 9
) -> dict[str, Any]:
    """Time the ways of bringing an adapter of each rank to the device."""
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
    """Return the median milliseconds of `work`."""
    times = []
    for _ in range(repeats):
        _synchronize()
        begin = time.perf_counter()
        work()
        _synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return median(times)


def _arrive(store: AdapterStore, adapter: Adapter) -> tuple[float, float]:
    """Return the milliseconds from asking for an adapter to its first layer group and to its last."""
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


def modes(keep: Keep = nothing, size: Size = MODES_7B) -> dict[str, Any]:
    """Measure the modes in turn on one engine; each begins with no adapter on the device."""
    loaded = start(size, PIPELINED, size.places, pool_for(size, size.places))
    report = _about(loaded, size, size.places)
    for mode in MODES:
        switch(loaded, mode)
        install(loaded, size, size.adapters)
        _mode(report, loaded, size, mode, keep)
    return report


def modes_cached(keep: Keep = nothing, size: Size = MODES_7B) -> dict[str, Any]:
    """Measure an engine that keeps every adapter on the device."""
    loaded = start(size, CACHED, size.adapters, pool_for(size, size.adapters))
    install(loaded, size, size.adapters)
    report = _about(loaded, size, size.adapters)
    _mode(report, loaded, size, CACHED, keep)
    return report


def toppings(keep: Keep = nothing, size: Size = TOPPINGS_7B, warm_up: int = 3) -> dict[str, Any]:
    """Serve requests one after another, as the artifact's client sends them, in each mode and then with all cached."""
    loaded = start(size, PIPELINED, size.places, pool_for(size, size.places))
    report = {**_about(loaded, size, size.places), "host_gflops": host_gflops(), "host_cores": host_cores()}
    for mode in (*MODES, CACHED):
        if mode != CACHED:  # the adapters of the mode before are still there
            switch(loaded, mode)
            install(loaded, size, size.adapters)
        before, vocab = counts(loaded), loaded.model.vocab_size
        asks = closed(size, [f"a{number}" for number in range(size.adapters)])
        serve(loaded, asks[:warm_up], vocab, 1, seed=98)
        found = serve(loaded, asks[warm_up:], vocab, 1, seed=99)
        _add(report, {"mode": mode, **found, "loads": counts(loaded)["loads"] - before["loads"]}, keep)
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


def _add(report: dict[str, Any], row: dict[str, Any], keep: Keep) -> None:
    report["rows"].append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    print(report["rows"][-1], flush=True)
    keep(report)


def oversubscribed_mixed(keep: Keep = nothing, size: Size = MIXED_8B) -> dict[str, Any]:
    """Measure many adapters of mixed rank over places for few.

    vLLM 0.26.0 on an H200: 930 tokens a second and a mean TTFT of 3.3 s (256 over 32), 1,780 (32 over 32)."""
    loaded = start(size, ON_DEMAND, size.places, pool_for(size, size.places))
    install(loaded, size, size.adapters)
    report: dict[str, Any] = {"size": vars(size), "rows": []}
    total = 3 * size.concurrency
    for adapters in (size.places, size.adapters):
        names = [f"a{i % adapters}" for i in range(max(total, adapters))]
        random.Random(adapters).shuffle(names)
        _measured(report, loaded, size, names, {"adapters": adapters, "places": size.places}, keep)
    return report


def oversubscribed_slots(keep: Keep = nothing, size: Size = SLOTS_8B, extra: Sequence[int] = (1000,)) -> dict[str, Any]:
    """Measure more and more adapters over the same places."""
    loaded = start(size, ON_DEMAND, size.places, pool_for(size, size.places))
    install(loaded, size, size.adapters)
    report: dict[str, Any] = {"size": vars(size), "rows": []}
    every = [size.places * 2**step // 2 for step in range(12) if size.places * 2**step // 2 <= size.adapters]
    for adapters in (*every, *extra):
        names = zipf(adapters, 1.0, 3 * size.concurrency, adapters)
        _measured(report, loaded, size, names, {"adapters": adapters, "places": size.places}, keep)
    return report


def all_resident(keep: Keep = nothing, size: Size = SLOTS_8B, adapters: int = 1000) -> dict[str, Any]:
    """Measure the load of `oversubscribed_slots` with all adapters on the device."""
    loaded = start(size, "cached", adapters, pool_for(size, adapters))
    install(loaded, size, adapters)
    report: dict[str, Any] = {"size": vars(size), "rows": []}
    names = zipf(adapters, 1.0, 3 * size.concurrency, adapters)
    _measured(report, loaded, size, names, {"adapters": adapters, "places": adapters}, keep)
    return report


def _measured(
    report: dict[str, Any], loaded: Loaded, size: Size, names: Sequence[str], row: dict[str, Any], keep: Keep
) -> None:
    """Measure a load after each adapter that finds a place has been asked for once."""
    vocab = loaded.model.vocab_size
    first = closed(size, list(dict.fromkeys(names))[: row["places"]])
    serve(loaded, first, vocab, size.concurrency, seed=1000 + len(report["rows"]))
    before = counts(loaded)
    found = serve(loaded, closed(size, names), vocab, size.concurrency, seed=len(report["rows"]))
    _add(report, row | found | {key: value - before[key] for key, value in counts(loaded).items()}, keep)


def crossover(
    keep: Keep = nothing, size: Size = CROSSOVER_7B, prompts: Sequence[int] = PROMPTS, repeats: int = 3
) -> dict[str, Any]:
    """Time a lone request whose adapter is not on the device, by rank, prompt and mode."""
    largest = replace(size, ranks=(max(size.ranks),))
    loaded = start(largest, PIPELINED, size.places, pool_for(largest, size.places))
    patience, arriving_of(loaded).patience = arriving_of(loaded).patience, 0.0
    report: dict[str, Any] = {"size": vars(size), "rows": [], "patience_ms": patience * 1e3}
    spec = spec_from_config(config(size.shape))
    for busy in (False, True):
        with bus_traffic(busy):
            for rank in size.ranks:
                (adapter,) = make_adapters(spec, 1, (rank,), size.modules)
                for prompt in prompts:
                    row: dict[str, Any] = {"bus_busy": busy, "rank": rank, "prompt": prompt}
                    for mode in MODES:
                        switch(loaded, mode)
                        row[f"{mode}_ms"] = median(_cold(loaded, adapter, prompt, n) for n in range(repeats))
                    _add(report, row, keep)
    return report


def _cold(loaded: Loaded, adapter: Adapter, prompt: int, number: int) -> float:
    """Return the milliseconds to the first token of a request whose adapter is not on the device."""
    store_of(loaded).add("cold", adapter)
    found = serve(loaded, [Ask("cold", prompt, 2)], loaded.model.vocab_size, seed=number)
    store_of(loaded).remove("cold")
    return float(found["ttft_mean_ms"])


STAGES: Mapping[str, Callable[[Keep], dict[str, Any]]] = MappingProxyType(
    {
        "adapters-load": load,
        "adapters-toppings": toppings,
        "adapters-modes": modes,
        "adapters-modes-cached": modes_cached,
        "adapters-oversubscribed-mixed": oversubscribed_mixed,
        "adapters-oversubscribed-slots": oversubscribed_slots,
        "adapters-all-resident": all_resident,
        "adapters-crossover": crossover,
    }
)


def run(stage: str, keep: Keep) -> dict[str, Any]:
    """Run a stage; `keep` writes what there is so far."""
    return STAGES[stage](keep)


def plot(folder: Path) -> Path:
    """Draw TTFT and throughput against adapters per place from the results of oversubscribed-slots and all-resident."""
    from perf.plots import oversubscription

    rows = json.loads((folder / "adapters-oversubscribed-slots.json").read_text())["result"]["rows"]
    resident = folder / "adapters-all-resident.json"
    best = json.loads(resident.read_text())["result"]["rows"][0] if resident.exists() else None
    target = folder / "adapters-oversubscribed.png"
    target.write_bytes(oversubscription(rows, best))
    return target


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="perf.gpu.adapters", description="Draw what oversubscription costs from a folder of results.")
    parser.add_argument("what", choices=["plot"])
    parser.add_argument("folder", type=Path)
    print(plot(parser.parse_args(argv).folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
