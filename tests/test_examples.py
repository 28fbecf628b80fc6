"""Thirds of hypothesis's examples, and all of them with --long."""

from __future__ import annotations

from tests.examples import examples, load_profile


def test_examples_are_a_third_of_those_named_or_all(long: bool) -> None:
    assert examples(60).max_examples == (60 if long else 20)
    load_profile(not long)
    try:
        assert examples(60).max_examples == (20 if long else 60)
        assert examples(60, stateful_step_count=7).stateful_step_count == 7
    finally:
        load_profile(long)
