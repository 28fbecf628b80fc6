"""The bank: what is read is what was written, and never something of another base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inlaid.quant.bank import TILE, Bank, BankError, entry_key

CPU = torch.device("cpu")


def moments(size: int = 20) -> torch.Tensor:
    x = torch.randn(100, size, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, size)
    upper = (x.T @ x / 100).triu()
    return upper + upper.triu(1).T


def test_single_precision_comes_back_bit_for_bit(tmp_path: Path) -> None:
    entry = Bank(tmp_path).entry("k")
    assert not entry.has(3)
    large = moments(2 * TILE + 7)
    entry.write(3, {"a.b": moments(), "a": moments(7), "b": large}, {"a.b": ["a.b", "a.c"], "a": ["a"]}, 12.5)
    assert entry.has(3)
    assert not entry.complete(4)
    assert torch.equal(entry.read(3, "a.b", CPU), moments())
    assert torch.equal(entry.read(3, "a", CPU), moments(7))
    assert torch.equal(entry.read(3, "b", CPU), large)
    assert entry.members(3) == {"a.b": ["a.b", "a.c"], "a": ["a"]}
    assert entry.tokens(3) == 12.5


def test_half_precision_is_half_the_size_and_near(tmp_path: Path) -> None:
    sizes = {}
    for precision in ("float32", "float16"):
        entry = Bank(tmp_path, precision).entry("k")
        entry.write(0, {"a": moments(200)}, {"a": ["a"]}, 1.0)
        sizes[precision] = sum(file.stat().st_size for file in entry.path.iterdir())
        back = entry.read(0, "a", CPU)
        deviation = moments(200).diagonal().sqrt()
        error = (back - moments(200)) / deviation[:, None] / deviation[None, :]
        assert float(error.abs().max()) < 5e-4
        assert torch.equal(back, back.T)
        torch.testing.assert_close(back.diagonal(), moments(200).diagonal())
    assert sizes["float16"] < 0.55 * sizes["float32"]


def test_keys_follow_every_fact() -> None:
    facts = {"base": "a", "adapter": "b", "data": "c", "calibration": {"seed": 0}}
    key = entry_key(**facts)
    assert key == entry_key(**dict(reversed(facts.items())))
    for name in facts:
        assert entry_key(**(facts | {name: "other"})) != key


def test_a_torn_file_is_told(tmp_path: Path) -> None:
    entry = Bank(tmp_path).entry("k")
    entry.write(0, {"a": moments()}, {"a": ["a"]}, 1.0)
    (file,) = entry.path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BankError, match="delete it"):
        entry.read(0, "a", CPU)


def test_only_the_named_entries_stay(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    gone, kept, mixed = (entry_key(task=name) for name in ("gone", "kept", "mixed"))
    for key in (gone, kept, mixed):
        bank.entry(key).write(0, {"a": moments()}, {"a": ["a"]}, 1.0)
    foreign = [tmp_path / "thesis", tmp_path / f"{mixed}-float32" / "notes.txt"]
    foreign[0].mkdir()
    foreign[1].write_text("mine")
    bank.keep_only({kept})
    assert not bank.entry(gone).path.exists()
    assert bank.entry(kept).has(0)
    assert not bank.entry(mixed).has(0)
    assert all(path.exists() for path in foreign)
    with pytest.raises(BankError, match="float16"):
        Bank(tmp_path, "float8")
