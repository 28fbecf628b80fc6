"""The nouns: what a Work is, and that what crosses to the server survives the crossing."""

from __future__ import annotations

import msgspec

from inlaid.engine.account import Account
from inlaid.engine.request import FinishReason, NewRequest, Output, Request, SamplingParams, TokenLogprobs, Work


def make(tokens: int) -> Request:
    prompt = [1, 2, 3]
    return Request(
        id="r",
        prompt=prompt,
        params=SamplingParams(),
        adapter=None,
        adapter_name=None,
        account=Account("", 0),
        arrival=0.0,
        tokens=prompt + [9] * (tokens - 3),
    )


def test_a_decode_is_one_token_beyond_the_prompt() -> None:
    request = make(5)
    assert Work(request, 3, 1, True).is_decode
    assert not Work(request, 2, 1, True).is_decode
    assert not Work(request, 3, 2, True).is_decode
    assert (request.num_prompt, request.num_outputs) == (3, 2)


def test_what_crosses_the_socket_comes_out_the_same() -> None:
    new = NewRequest(id="r", prompt=[1, 2], params=SamplingParams(stop=("x",), logit_bias={3: -1.0}), tenant="t")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(new), type=NewRequest) == new
    logprobs = TokenLogprobs(5, -0.5, 1, [(5, -0.5), (6, -1.0)])
    out = Output(id="r", tokens=[5], logprobs=[logprobs], finish_reason=FinishReason.STOP, stop_token=5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(out), type=Output) == out
