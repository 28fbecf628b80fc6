"""Speculation over HTTP: the same answers in fewer steps, counted, and opted out of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.live import Live, serving

BODY: dict[str, Any] = {"model": "maths", "prompt": "Tom has 6 boys.", "max_tokens": 24, "temperature": 0}
DRAFTS = "vllm:spec_decode_num_drafts_total"


@pytest.fixture(scope="module")
def guessing() -> Iterator[Live]:
    config = '{"method": "suffix", "num_speculative_tokens": 4}'
    with serving("--speculative-config", config, "--speculation-length", "fixed") as live:
        yield live


def text_of(live: Live, **more: Any) -> str:
    answer = live.ask("POST", "/v1/completions", {**BODY, "ignore_eos": True, **more})
    assert answer.status == 200, answer.body
    assert "Warning" not in answer.headers
    return str(answer.json["choices"][0]["text"])


def test_an_answer_that_was_given_before_is_given_again_in_fewer_steps(guessing: Live, server: Live) -> None:
    expected = text_of(server)
    assert text_of(guessing) == expected
    steps = guessing.metric("vllm:iteration_tokens_total_count")
    assert text_of(guessing) == expected
    assert guessing.metric("vllm:iteration_tokens_total_count") - steps < 16
    assert guessing.metric(DRAFTS) > 0
    assert guessing.metric("inlaid:spec_decode_num_accepted_tokens_total") >= 8
    stops = {"stop": [expected[8:12]], "logprobs": 1}
    assert text_of(guessing, **stops) == text_of(server, **stops)


def test_a_request_may_opt_out(guessing: Live) -> None:
    expected, before = text_of(guessing), guessing.metric(DRAFTS)
    assert text_of(guessing, speculation=False) == expected
    assert guessing.metric(DRAFTS) == before
