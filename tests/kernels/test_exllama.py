"""The exllama and humming backends as far as they need no GPU: refusals, packing, building, the shipped tables. Their
values are checked on a GPU by perf/gpu/checks.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from inlaid.checkpoint import QuantSpec, pack
from inlaid.kernels import exllama, humming

CPU = torch.device("cpu")


def test_refusals_say_what_would_help() -> None:
    backend = exllama.ExllamaLinear()
    assert "needs an NVIDIA GPU" in (backend.why_not(QuantSpec(4, 128, True, False), CPU) or "")
    assert "need an NVIDIA GPU" in (humming.HummingLinear().why_not(QuantSpec(4, 128, True, False), CPU) or "")
    cuda = torch.device("cuda")
    assert "reads 4 bits, not 3" in (backend.why_not(QuantSpec(3, 128, True, False), cuda) or "")
    assert "multiple of 32" in (backend.why_not(QuantSpec(4, 48, True, False), cuda) or "")


def test_shuffled_words_unpack_in_pairs() -> None:
    """Low half: codes 0 2 4 6; high half: 1 3 5 7. Masking 0x000f000f then yields neighbours."""
    codes = torch.arange(16).reshape(16, 1) % 16
    shuffled = exllama.shuffle(pack(codes, 4))
    for word in range(2):
        value = int(shuffled[word, 0]) & 0xFFFFFFFF
        pairs = [((value >> (4 * i)) & 0xF, (value >> (16 + 4 * i)) & 0xF) for i in range(4)]
        assert pairs == [(8 * word + 2 * i, 8 * word + 2 * i + 1) for i in range(4)]


def test_missing_pieces_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exllama, "headers", lambda: None)
    with pytest.raises(exllama.BuildError, match="exllamav2 is not installed"):
        exllama.build("90")
    monkeypatch.setattr(exllama, "headers", lambda: tmp_path)
    monkeypatch.setattr(exllama, "nvcc", lambda: None)
    with pytest.raises(exllama.BuildError, match="nvcc was not found"):
        exllama.build("90")


def test_a_build_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that answers --version and then fails."""
    compiler = tmp_path / "nvcc"
    compiler.write_text('#!/bin/sh\ncase "$1" in --version) echo 1;; *) echo "no such luck" >&2; exit 3;; esac\n')
    compiler.chmod(0o755)
    (tmp_path / "config.h").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(exllama, "headers", lambda: tmp_path)
    monkeypatch.setattr(exllama, "nvcc", lambda: str(compiler))
    with pytest.raises(exllama.BuildError, match="no such luck"):
        exllama.build("90")
    assert list((tmp_path / "cache" / "inlaid").iterdir()) == []


@pytest.mark.skipif(
    exllama.headers() is None or exllama.nvcc() is None,
    reason="needs nvcc and exllamav2 installed (pip install 'exllamav2==0.3.2')",
)
def test_builds_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = exllama.build("90")
    stamp = first.stat().st_mtime_ns
    assert exllama.build("90") == first
    assert first.stat().st_mtime_ns == stamp
    exllama.load(first)


def test_tuning_names_known_buckets() -> None:
    entries = json.loads(humming.TUNING.read_text())["entries"]
    assert entries
    for entry in entries:
        assert set(entry["buckets"]) <= set(humming.ROW_BUCKETS)
        assert entry.get("ordered") or entry["best_us"] < entry["own_us"]
        assert entry["changes"]
