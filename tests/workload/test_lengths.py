"""Length distributions."""

from __future__ import annotations

import numpy as np
import pytest

from inlaid.workload.lengths import Lengths, draw_lengths
from perf.options import parse_lengths


def draw(spec: Lengths, count: int = 10_000) -> np.ndarray:
    return np.array(draw_lengths(spec, count, np.random.default_rng(0)))


def test_fixed() -> None:
    assert set(draw(Lengths(value=33))) == {33}


def test_uniform_includes_both_ends() -> None:
    found = draw(Lengths("uniform", low=8, high=11))
    assert set(found) == {8, 9, 10, 11}


def test_lognormal_has_its_median_and_is_clipped() -> None:
    found = draw(Lengths("lognormal", median=100, sigma=1, low=5, high=900))
    assert np.median(found) == pytest.approx(100, rel=0.05)
    assert found.min() >= 5
    assert found.max() <= 900


def test_flags() -> None:
    assert parse_lengths("fixed:7") == Lengths("fixed", value=7)
    assert parse_lengths("uniform:8:512") == Lengths("uniform", low=8, high=512)
    assert parse_lengths("lognormal:100:0.5", 900) == Lengths("lognormal", median=100, sigma=0.5, high=900)
    for bad in ("fixed", "fixed:x", "uniform:9:3", "normal:1:2", "fixed:0"):
        with pytest.raises(ValueError, match="length"):
            parse_lengths(bad)
