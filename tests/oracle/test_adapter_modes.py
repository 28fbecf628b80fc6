"""The four ways of having an adapter ready, over a link that takes its time: all give the judge's tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracle import Judge, add_adapter, ask, load_engine, prompts, serve

from inlaid.adapters.loader import Arrival
from inlaid.adapters.peft import AdapterError
from inlaid.adapters.store import MODES, AdapterStore
from inlaid.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
ADAPTERS = {path.name: path for path in sorted((DEMO / "adapters").iterdir()) if path.is_dir()}
SLOW = {"adapter_link_gbps": 0.01}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(DEMO / "base", ADAPTERS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the forward waited for a layer group, and how often it computed from host memory."""
    counted: Counter[str] = Counter()

    def count(owner: type[Any], name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def counting(*arguments: Any) -> Any:
            counted[name] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, counting)

    count(Arrival, "wait")
    count(AdapterStore, "host_matrices")
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
    assert (calls["host_matrices"] > 0) == (mode == "cpu-assist")


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
    with pytest.raises(ConfigError, match="known: cached, on-demand, pipelined, cpu-assist"):
        load_engine(DEMO / "base", adapters={"adapter_mode": "lazy"})
