"""The stages that measure adapters on a GPU, with a tiny model on whatever is here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inlaid.adapters.modes import MODES
from perf.gpu import adapter_engine, adapters
from perf.gpu.adapter_engine import Size
from perf.gpu.bench import LIMITS
from perf.gpu.headlines import headline

TINY = Size("tiny", 6, 3, (4, 8), rate=50.0, seconds=0.2, prompt=12, output=4, concurrency=4)
FIGURES = {
    "requests",
    "output_tokens_per_second",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "itl_p99_ms",
    "cpu_seconds_per_request",
}


@pytest.fixture(autouse=True, scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_engine, "ROOT", tmp_path_factory.mktemp("models"))
        yield


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    json.dumps(report)
    return list(report["rows"])


def test_every_stage_is_registered() -> None:
    assert {name for name in LIMITS if name.startswith("adapters-")} == set(adapters.STAGES)
    assert {"cached", *adapters.MODES} == set(MODES)


def test_load() -> None:
    kept: list[int] = []
    found = rows(adapters.load(lambda part: kept.append(len(part["rows"])), ranks=(2, 4), shape="tiny", repeats=2))
    assert kept == [1, 2]
    assert [row["rank"] for row in found] == [2, 4]
    for row in found:
        assert row["mib"] > 0
        assert 0 < row["pipelined_first_group_ms"] <= row["pipelined_ms"]
        assert min(row["pageable_ms"], row["pinned_ms"]) >= 0


def test_toppings() -> None:
    size = Size("tiny", 5, 6, (4,), prompt=4, output=3)
    report = adapters.toppings(size=size, warm_up=1)
    found = rows(report)
    assert [row["mode"] for row in found] == [*adapters.MODES, "cached"]
    assert all(row["requests"] == 4 and row["latency_mean_ms"] >= row["ttft_mean_ms"] > 0 for row in found)
    assert [row["loads"] for row in found] == [5] * len(adapters.MODES) + [0]
    assert report["host_gflops"] > 0


def test_modes() -> None:
    report = adapters.modes(size=TINY)
    found = rows(report)
    assert [row["mode"] for row in found] == [mode for mode in adapters.MODES for _ in range(4)]
    assert [row.get("zipf") for row in found] == 2 * [0.6, 1.0, 1.4, None]
    assert all(set(row) >= FIGURES for row in found)
    assert [row["requests"] for row in found] == 2 * [10, 10, 10, 4]
    for mode in adapters.MODES:
        assert sum(row.get("loads", 0) for row in found if row["mode"] == mode) > 0
    assert "on-demand poisson 0.6 10 " in headline(report)


def test_mode_cached_loads_nothing_while_it_serves() -> None:
    report = adapters.modes_cached(size=TINY)
    assert [row.get("loads", 0) for row in rows(report)] == [0, 0, 0, 0]
    assert {row["mode"] for row in report["rows"]} == {"cached"}
    assert report["kv_tokens"] > 100


@pytest.mark.parametrize("mode", adapters.MODES)
def test_a_switched_engine_is_one_that_was_started_so(mode: str) -> None:
    """Compare the groups to wait for and the first device tables of both; no adapter is left behind."""
    room = adapters.pool_for(TINY, TINY.places)
    started, switched = (adapters.start(TINY, which, TINY.places, room) for which in (mode, "pipelined"))
    adapters.install(switched, TINY, 6)
    asks = [adapters.Ask(f"a{i}", 5, 3) for i in range(6)]
    adapters.serve(switched, asks, switched.model.vocab_size)
    assert adapters.store_of(switched).resident()
    adapters.switch(switched, mode)
    adapters.install(switched, TINY, 6)
    ours, store = adapters.store_of(switched), adapters.store_of(started)
    assert ours.resident() == []
    assert adapters.counts(switched) == {"loads": 0, "evictions": 0, "hits": 0}
    assert (ours.mode, ours.groups_to_start) == (store.mode, store.groups_to_start)
    arriving = started.engine.runner.arriving  # type: ignore[attr-defined]
    assert (switched.engine.runner.arriving is not None) == (arriving is not None)  # type: ignore[attr-defined]


def test_64_requests_that_arrive_in_a_row_fit_beside_512_adapters() -> None:
    """On 80 GB: 0.85 of 79.2 GiB, without adapters, 3.7 GiB of weights and 1.3 of buffers; 0.5 MiB of KV a token."""
    size = adapters.MODES_7B
    pool = (size.adapters + 1) * 64 * 3 * (4096 + 4096) * 32 * 2 / 2**30
    tokens = (0.85 * 79.2 - 3.7 - 1.3 - pool) * 2**11
    for number, alpha in enumerate((0.6, 1.0, 1.4)):
        names = adapters.zipf(size.adapters, alpha, int(size.rate * size.seconds), number)
        lengths = [ask.prompt + ask.output for ask in adapters.poisson(size, names, number)]
        assert max(sum(lengths[i : i + 64]) for i in range(len(lengths) - 63)) < 0.8 * tokens


def test_oversubscription_and_its_plot(tmp_path: Path) -> None:
    mixed = rows(adapters.oversubscribed_mixed(size=TINY))
    assert [(row["adapters"], row["requests"]) for row in mixed] == [(3, 12), (6, 12)]
    assert mixed[0]["loads"] == 0 < mixed[1]["loads"]
    size = replace(TINY, adapters=16, places=4)
    slots, resident = adapters.oversubscribed_slots(size=size, extra=(5,)), adapters.all_resident(size=size, adapters=5)
    assert [row["adapters"] for row in rows(slots)] == [2, 4, 8, 16, 5]
    assert [row["places"] for row in rows(resident)] == [5]
    assert headline(slots).startswith("2 4 12 ")
    for name, result in (("slots", slots), ("resident", resident)):
        (tmp_path / f"adapters-oversubscribed-{name}.json").write_text(json.dumps({"result": result}))
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    assert adapters.main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "adapters-oversubscribed.png").read_bytes().startswith(b"\x89PNG")


def test_crossover() -> None:
    size = replace(TINY, adapters=1, places=2, ranks=(2, 4))
    report = adapters.crossover(size=size, prompts=(3, 9), repeats=1)
    found = rows(report)
    assert [(row["bus_busy"], row["rank"], row["prompt"]) for row in found] == [
        (busy, rank, prompt) for busy in (False, True) for rank in (2, 4) for prompt in (3, 9)
    ]
    assert all({"on-demand_ms", "pipelined_ms"} <= set(row) for row in found)
