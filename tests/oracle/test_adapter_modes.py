"""The four ways of having an adapter ready, over a link that takes its time: all give the judge's tokens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inlaid.adapters.adapter import AdapterError
from inlaid.adapters.loader import CopiedByHost, Loader
from inlaid.adapters.modes import MODES
from inlaid.adapters.store import AdapterStore
from inlaid.config import ConfigError
from inlaid.engine.request import FinishReason
from tests.cases import spread
from tests.oracle.oracle import Judge, add_adapter, ask, load_engine, prompts, serve

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
ADAPTERS = {path.name: path for path in sorted((DEMO / "adapters").iterdir()) if path.is_dir()}
SLOW = {"adapter_link_gbps": 0.01}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(DEMO / "base", ADAPTERS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often the forward pass waited for a layer group."""
    counted: Counter[str] = Counter()

    def count(owner: type[Any], name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def counting(*arguments: Any) -> Any:
            counted[name] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, counting)

    count(CopiedByHost, "wait")
    return counted


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_the_same(judge: Judge, calls: Counter[str], mode: str) -> None:
    """Twelve adapters in room for three (cached: for all), chunked prompts, and again when they have been evicted."""
    engine, loaded = load_engine(
        DEMO / "base",
        block_size=16,
        max_num_batched_tokens=64,
        max_loras=12 if mode == "cached" else 3,
        adapters={"adapter_mode": mode, **SLOW},
    )
    for name, folder in ADAPTERS.items():
        add_adapter(loaded, name, folder)
    names = [*ADAPTERS, None, *ADAPTERS]
    requests = [
        ask(f"{n}-{name}", prompt, name, 8)
        for n, (name, prompt) in enumerate(zip(names, prompts(len(names), 1, 90), strict=True))
    ]
    answers = serve(engine, requests)
    for request in requests:
        judge.check(request, answers[request.id])
    store = loaded.adapters
    store.check()
    evictions = sum(store.counts(store.identity(name) or "").evictions for name in ADAPTERS)
    assert (evictions > 0) == (mode != "cached")
    assert (calls["wait"] > 0) == (mode == "pipelined")


def test_cached_refuses_what_does_not_fit() -> None:
    _, loaded = load_engine(DEMO / "base", max_loras=2, adapters={"adapter_mode": "cached"})
    first, second, third = list(ADAPTERS)[:3]
    add_adapter(loaded, first, ADAPTERS[first])
    add_adapter(loaded, second, ADAPTERS[second])
    with pytest.raises(AdapterError, match=r"does not fit on the device beside 2 others.*--adapter-mode"):
        add_adapter(loaded, third, ADAPTERS[third])
    loaded.adapters.check()
    loaded.adapters.remove(first)
    add_adapter(loaded, third, ADAPTERS[third])
    loaded.adapters.check()


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"known: cached, on-demand, pipelined$"):
        load_engine(DEMO / "base", adapters={"adapter_mode": "lazy"})


def test_nobody_waits_for_anothers_adapter(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that never comes: the others are served, and its own request ends with the reason when time is up."""
    engine, loaded = load_engine(
        DEMO / "base", block_size=16, adapters={"adapter_link_gbps": 1.0, "adapter_timeout": 5.0}
    )
    store = loaded.adapters
    stuck, fine = list(ADAPTERS)[:2]
    for name in (stuck, fine):
        add_adapter(loaded, name, ADAPTERS[name])
    monkeypatch.setattr(Loader, "start", lambda self, groups, clock: CopiedByHost(len(groups), clock))
    engine.add(ask("stuck", [5, 6, 7], stuck))
    engine.step()
    monkeypatch.undo()
    outputs = []
    requests = [ask("fine", [5, 6, 7], fine), ask("base", [5, 6, 7])]
    for request in requests:
        engine.add(request)
    for _ in range(5000):
        outputs += engine.step()
        if sum(output.finish_reason is not None for output in outputs) == 2:
            break
        time.sleep(0.001)
    ended = {output.id: output.finish_reason for output in outputs if output.finish_reason is not None}
    assert ended == {"fine": FinishReason.LENGTH, "base": FinishReason.LENGTH}
    monkeypatch.setattr(store._residency, "_now", lambda: time.monotonic() + 6.0)
    (last,) = [output for _ in range(3) for output in engine.step()]
    assert (last.id, last.finish_reason) == ("stuck", FinishReason.ERROR)
    assert "did not arrive within 5 s" in (last.refusal.message if last.refusal else "")
    engine.scheduler.check_whole()
    store.check()


def test_a_host_budget_for_four_of_twelve_adapters(judge: Judge) -> None:
    """Most adapters are read from disk again, and the tokens are right."""
    engine, loaded = load_engine(
        DEMO / "base",
        block_size=16,
        max_loras=2,
        adapters={"max_cpu_adapter_gib": 4 / 1024, "adapter_mode": "pipelined"},
    )
    for name, folder in ADAPTERS.items():
        add_adapter(loaded, name, folder)
    requests = [
        ask(name, prompt, name, 6) for name, prompt in zip(ADAPTERS, prompts(len(ADAPTERS), 2, 30), strict=True)
    ]
    answers = serve(engine, requests)
    for request in requests:
        judge.check(request, answers[request.id])
    store = loaded.adapters
    store.check()
    tiers = Counter(store.tier(store.identity(name) or "") for name in ADAPTERS)
    assert tiers["device"] == 2
    assert tiers["disk"] > 0
    assert sum(store.counts(store.identity(name) or "").reads for name in ADAPTERS) > 0
    assert store.host_bytes <= 4 * 2**20


@pytest.mark.parametrize("mode", spread((("pipelined",), ("on-demand",)), every=3))
def test_tokens_are_the_same_in_unified_memory(judge: Judge, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Adapters have room for one and borrow from KV, which takes its blocks back for many prompts at once."""
    given_back: list[int] = []
    give_back = AdapterStore.give_back

    def noting(store: AdapterStore, count: int, keep: str | None) -> list[int]:
        given_back.extend(blocks := give_back(store, count, keep))
        return blocks

    monkeypatch.setattr(AdapterStore, "give_back", noting)
    engine, loaded = load_engine(
        DEMO / "base",
        block_size=16,
        num_blocks=90,
        max_model_len=160,
        max_num_batched_tokens=128,
        max_num_seqs=10,
        max_loras=12,
        reserve=0.0,
        cache={"unified_memory": True},
        adapters={"adapter_mode": mode, "adapter_memory_gib": 2 / 1024},
    )
    store, pool = loaded.adapters, engine.scheduler.pool
    assert (pool.guaranteed, pool.num_lent, store.floor_bytes) == (10, 0, 22 * 16 * 128 * 2 * 6 * 4)
    for name, folder in ADAPTERS.items():
        add_adapter(loaded, name, folder)
    names = [*ADAPTERS, None, *ADAPTERS, None, None]
    requests = [
        ask(f"{n}-{name}", prompt, name, 40)
        for n, (name, prompt) in enumerate(zip(names, prompts(len(names), 1, 110), strict=True))
    ]
    answers = serve(engine, requests)
    for request in requests:
        judge.check(request, answers[request.id])
    store.check()
    assert pool.num_lent > 0
    assert given_back
    assert sum(store.counts(store.identity(name) or "").evictions for name in ADAPTERS) > 0
