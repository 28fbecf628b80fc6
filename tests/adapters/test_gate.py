"""The gate passes exactly the pair that was evaluated and passed, and says which number failed otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlaid.adapters.gate import GateError, check

GOOD = {
    "base_version": "base-1",
    "adapter_identity": "adapter-1",
    "adapter": "velar",
    "task": "to_velar",
    "metric": "exact_match",
    "score": 97.0,
    "reference": 98.5,
    "drop": 1.5,
}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"provenance": {"commit": "x"}, "records": records}))
    return path


def test_a_passing_record_passes(tmp_path: Path) -> None:
    check(write(tmp_path / "r.json", GOOD), "base-1", "adapter-1", max_drop=2)


@pytest.mark.parametrize(
    ("base", "adapter", "reason"),
    [
        ("base-2", "adapter-1", "only for other bases"),
        ("base-1", "adapter-2", "not with these adapter weights"),
        ("base-2", "adapter-2", "neither this base"),
    ],
)
def test_another_base_or_other_weights_have_no_record(tmp_path: Path, base: str, adapter: str, reason: str) -> None:
    with pytest.raises(GateError, match=reason):
        check(write(tmp_path / "r.json", GOOD), base, adapter, max_drop=2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"drop": 2.5}, r"to_velar \(exact_match 97.00\) drops 2.50 points against 98.50.*more than the 2 allowed"),
        ({"drop": None}, "no full-precision score"),
        ({"faults": ["does no better than the base alone"]}, "to_velar.*does no better than the base alone"),
    ],
)
def test_the_failed_number_is_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(GateError, match=reason):
        check(write(tmp_path / "r.json", GOOD | change), "base-1", "adapter-1", max_drop=2)


def test_a_record_speaks_for_its_form_of_keys_and_values(tmp_path: Path) -> None:
    """A score with keys and values in full says nothing of 8 bits, nor the other way round."""
    full = write(tmp_path / "full.json", GOOD)
    with pytest.raises(GateError, match=r"no record with int8 keys and values.*variants that end with \+kv-int8"):
        check(full, "base-1", "adapter-1", max_drop=2, kv="int8")
    coded = write(tmp_path / "coded.json", GOOD | {"kv_cache_dtype": "int8"})
    check(coded, "base-1", "adapter-1", max_drop=2, kv="int8")
    with pytest.raises(GateError, match="no record with auto keys and values"):
        check(coded, "base-1", "adapter-1", max_drop=2)


def test_one_failing_task_of_several_refuses_the_adapter(tmp_path: Path) -> None:
    worse = GOOD | {"task": "code", "drop": 7.0}
    with pytest.raises(GateError, match="code") as raised:
        check(write(tmp_path / "r.json", GOOD, worse), "base-1", "adapter-1", max_drop=2)
    assert "to_velar" not in str(raised.value)


def test_records_of_other_pairs_neither_help_nor_harm(tmp_path: Path) -> None:
    others = [GOOD | {"base_version": "base-2", "drop": 90.0}, GOOD | {"adapter_identity": "adapter-9", "drop": 90.0}]
    check(write(tmp_path / "r.json", GOOD, *others), "base-1", "adapter-1", max_drop=2)


@pytest.mark.parametrize(
    "text", ["", "{", '{"records": 3}', '{"cells": []}', '{"records": [{"task": "x"}]}', '{"records": [NaN]}']
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(GateError, match="not a report"):
        check(path, "base-1", "adapter-1", max_drop=2)


def test_an_absent_file_and_an_absurd_limit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="cannot be read"):
        check(tmp_path / "none.json", "base-1", "adapter-1", max_drop=2)
    for absurd in (-1.0, float("nan")):
        with pytest.raises(GateError, match="max drop"):
            check(write(tmp_path / "r.json", GOOD), "base-1", "adapter-1", max_drop=absurd)
