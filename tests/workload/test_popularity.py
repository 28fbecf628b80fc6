"""Adapter distributions: the share that each adapter gets."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from inlaid.workload.popularity import AdapterChoice, choose_adapters, name_by_appearance, parse_skew

NAMES = [f"a{i}" for i in range(10)]


def counts(spec: AdapterChoice, size: int = 20_000) -> Counter:
    return Counter(choose_adapters(spec, NAMES, size, np.random.default_rng(1)))


def test_uniform_gives_everyone_the_same() -> None:
    assert all(count == pytest.approx(2000, rel=0.1) for count in counts(AdapterChoice("uniform")).values())


def test_distinct_never_repeats_a_neighbour() -> None:
    chosen = choose_adapters(AdapterChoice("distinct"), NAMES, 25, np.random.default_rng(0))
    assert chosen == [NAMES[i % 10] for i in range(25)]


def test_identical_is_all_the_first() -> None:
    assert counts(AdapterChoice("identical")) == {"a0": 20_000}


def test_zipf_follows_its_law() -> None:
    found = counts(AdapterChoice("zipf", 1.0))
    assert found["a0"] / found["a3"] == pytest.approx(4.0, rel=0.1)


def test_skewed_is_geometric() -> None:
    found = counts(AdapterChoice("skewed", 2.0))
    assert found["a1"] / found["a3"] == pytest.approx(4.0, rel=0.1)


def test_power_gives_the_first_n_to_the_minus_alpha() -> None:
    """P(first) = P(U**(1/alpha) < 1/n) = n**-alpha."""
    assert counts(AdapterChoice("power", 0.5))["a0"] / 20_000 == pytest.approx(10**-0.5, rel=0.05)


def test_rates_are_weights_by_name() -> None:
    found = counts(AdapterChoice("rates", rates={"x": 3.0, "y": 1.0}))
    assert found["x"] / found["y"] == pytest.approx(3.0, rel=0.1)


def test_indices_restrict_the_choice() -> None:
    assert set(counts(AdapterChoice("uniform", indices=[2, 5]), 100)) == {"a2", "a5"}
    with pytest.raises(ValueError, match="outside the 10 adapters"):
        counts(AdapterChoice("uniform", indices=[10]))


def test_none_asks_for_the_base() -> None:
    assert choose_adapters(AdapterChoice("none"), [], 2, np.random.default_rng(0)) == [None, None]


def test_no_adapters_served_is_said() -> None:
    with pytest.raises(ValueError, match="needs adapters"):
        choose_adapters(AdapterChoice(), [], 2, np.random.default_rng(0))


def test_trace_names_take_adapters_by_appearance() -> None:
    wanted = ["gpt", "llama", None, "gpt"]
    assert name_by_appearance(AdapterChoice("trace"), wanted, NAMES) == ["a0", "a1", None, "a0"]
    with pytest.raises(ValueError, match="names 2 adapters and 1 are served"):
        name_by_appearance(AdapterChoice("trace"), wanted, ["a0"])
    assert name_by_appearance(AdapterChoice("trace", fold=True), wanted, ["a0"]) == ["a0", "a0", None, "a0"]


def test_skew_axis() -> None:
    assert parse_skew("zipf-1.2") == AdapterChoice("zipf", 1.2)
    assert parse_skew(0.6) == AdapterChoice("zipf", 0.6)
    assert parse_skew("distinct") == AdapterChoice("distinct")
    with pytest.raises(ValueError, match="unknown skew 'ziff'"):
        parse_skew("ziff")
