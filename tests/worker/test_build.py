"""build_engine on the demo: adapters beside the model, left out, or refused by their records."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from inlaid.adapters.peft import read_adapter
from inlaid.config import AdapterConfig, EngineConfig
from inlaid.worker import adapters as worker_adapters
from inlaid.worker import build, loading
from inlaid.worker.build import build_engine

DEMO = Path(__file__).parents[2] / "models" / "demo"


def test_an_adapter_that_cannot_be_served_ends_a_strict_start_and_is_left_out_of_others(tmp_path: Path) -> None:
    config = EngineConfig(model=str(DEMO / "base"))
    adapters = {"good": str(DEMO / "adapters" / "to_velar"), "bad": str(tmp_path)}
    with pytest.raises(ValueError, match=str(tmp_path)):
        build_engine(config, adapters)
    loaded = build_engine(config, adapters, strict=False)
    assert [info.name for info in loaded.adapters.list()] == ["good"]
    assert list(loaded.left_out) == ["bad"]


def test_adapters_are_read_while_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights come only when an adapter has been read, and graphs would be captured only when all have been."""
    first, real, load_model = threading.Event(), read_adapter, loading.load_model

    def read(*args: Any, **more: Any) -> Any:
        adapter = real(*args, **more)
        first.set()
        return adapter

    def load(config: EngineConfig, opened: Any, settle: Any, image: Any) -> Any:
        assert first.wait(30)
        settle()
        assert len(readers[0].reads) == 2
        assert all(done.done() for _, done in readers[0].reads)
        return load_model(config, opened=opened, settle=settle, image=image)

    class Readers(worker_adapters.Readers):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            readers.append(self)

    readers: list[worker_adapters.Readers] = []
    monkeypatch.setattr(loading, "read_adapter", read)
    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setattr(build, "Readers", Readers)
    adapters = {name: str(DEMO / "adapters" / name) for name in ("to_velar", "maths")}
    loaded = build_engine(EngineConfig(model=str(DEMO / "base")), adapters)
    assert {info.name for info in loaded.adapters.list()} == set(adapters)


def test_with_require_eval_only_adapters_with_a_passing_record_are_served(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    adapters = {"velar": str(DEMO / "adapters" / "to_velar"), "maths": str(DEMO / "adapters" / "maths")}
    loaded = build_engine(EngineConfig(model=str(DEMO / "base")), adapters)
    identities = {info.name: info.identity for info in loaded.adapters.list()}
    records = [
        {"base_version": loaded.model.base_version, "adapter_identity": identities[name], "adapter": name, "task": name}
        | {"metric": "exact", "score": 90.0, "drop": drop}
        for name, drop in {"velar": 0.5, "maths": 5.0}.items()
    ]
    report.write_text(json.dumps({"records": records}))
    config = EngineConfig(model=str(DEMO / "base"), adapters=AdapterConfig(require_eval=str(report), max_drop=2.0))
    gated = build_engine(config, adapters, strict=False)
    assert [info.name for info in gated.adapters.list()] == ["velar"]
    assert "drops 5.00 points" in gated.left_out["maths"]
