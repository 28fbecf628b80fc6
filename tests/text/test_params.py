"""Sampling parameters: each bad value is refused by its name, the bounds themselves are allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from inlaid.engine.refusal import Refused
from inlaid.engine.request import Grammar, SamplingParams
from inlaid.text.params import POSITIVE, RANGES, check

VOCABULARY = 100


def changed(name: str, value: float) -> SamplingParams:
    more: dict[str, Any] = {"max_tokens": 2**31 - 1} if name == "min_tokens" else {}
    return SamplingParams(**{**more, name: value})


@pytest.mark.parametrize("name", RANGES)
def test_bounds_are_allowed_and_what_is_beyond_is_refused(name: str) -> None:
    least, most = RANGES[name]
    if name not in POSITIVE:
        check(changed(name, least), VOCABULARY)
    check(changed(name, most), VOCABULARY)
    for value in (least - 1, most + 1, math.nan, math.inf, 10**400, -(10**400), *([0.0] if name in POSITIVE else [])):
        with pytest.raises(Refused, match=f"^{name} is ") as refused:
            check(changed(name, value), VOCABULARY)
        assert refused.value.refusal.param == name


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(min_tokens=5, max_tokens=4), "min_tokens"),
        (SamplingParams(stop=("",)), "stop"),
        (SamplingParams(stop=("x",) * 65), "stop"),
        (SamplingParams(stop=("x" * 1025,)), "stop"),
        (SamplingParams(stop_token_ids=(100,)), "stop_token_ids"),
        (SamplingParams(allowed_token_ids=(100,)), "allowed_token_ids"),
        (SamplingParams(allowed_token_ids=(1,), grammar=Grammar(regex="a")), "allowed_token_ids"),
        (SamplingParams(allowed_token_ids=(1, 2), bad_words=((1,), (2,), (3,))), "bad_words"),
        (SamplingParams(bad_words=((),)), "bad_words"),
        (SamplingParams(bad_words=((1, 100),)), "bad_words"),
        (SamplingParams(bad_words=((1,),) * 1025), "bad_words"),
        (SamplingParams(stop_token_ids=(1,) * 101), "stop_token_ids"),
        (SamplingParams(allowed_token_ids=(1,) * 101), "allowed_token_ids"),
        (SamplingParams(logit_bias={-1: 0.0}), "logit_bias"),
        (SamplingParams(logit_bias={1: 101.0}), "logit_bias"),
        (SamplingParams(logit_bias={1: math.nan}), "logit_bias"),
    ],
)
def test_what_makes_no_sense_is_refused(params: SamplingParams, name: str) -> None:
    with pytest.raises(Refused) as refused:
        check(params, VOCABULARY)
    assert refused.value.refusal.param == name


@pytest.mark.parametrize("grammar", [Grammar(regex="a" * 200_000), Grammar(choice=("a",) * 100_001)])
def test_a_constraint_is_bounded_whatever_its_form(grammar: Grammar) -> None:
    with pytest.raises(Refused, match="longer than 200000 characters"):
        check(SamplingParams(grammar=grammar), VOCABULARY)
