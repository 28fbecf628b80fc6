"""Hostile folders of adapters and bases: each is accepted or refused by its name, in bounded memory and time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.reading import adapter_reader, read_base, read_spoilt
from tests.quant.tiny import write_base
from tests.server.live import DEMO


def test_a_spoilt_adapter_is_accepted_or_refused_by_name(tmp_path: Path) -> None:
    found = read_spoilt(adapter_reader(DEMO / "base"), DEMO / "adapters" / "to_velar", tmp_path, range(300))
    assert found["faults"] == []
    assert found["refused"] > found["accepted"] > 0


@pytest.mark.filterwarnings("ignore")  # of transformers and torch, about files that are damaged on purpose
def test_a_spoilt_base_is_accepted_or_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = read_spoilt(read_base, write_base(tmp_path / "base"), tmp_path, range(80))
    assert found["faults"] == []
    assert found["refused"] > found["accepted"] > 0
