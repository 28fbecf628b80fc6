"""Framing: whatever the pieces, the messages come out whole and in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.config import AdapterConfig, EngineConfig
from inlaid.engine.request import FinishReason, Grammar, NewRequest, Output, SamplingParams, TokenLogprobs
from inlaid.worker import messages

COMMANDS = [
    messages.Start(
        config=EngineConfig(model="m", adapters=AdapterConfig(max_loras=3)), adapters={"a": "/a"}, factory="f:g"
    ),
    messages.Add(
        request=NewRequest(
            id="r",
            prompt=[1, 2],
            params=SamplingParams(logit_bias={3: 1.5}, stop=("x",), grammar=Grammar(choice=("a", "b"))),
            adapter="a",
        )
    ),
    messages.Abort(id="r"),
    messages.Call(call=7, name="stats", arguments={"window": 1.0}),
]


@given(st.lists(st.sampled_from(COMMANDS), max_size=6), st.data())
def test_messages_survive_any_cutting(sent: list[messages.Message], data: st.DataObject) -> None:
    stream = b"".join(messages.frame(message) for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    framing = messages.Framing(messages.Command)
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)])]
    assert [message for piece in pieces for message in framing.feed(piece)] == sent


def test_outputs_come_back_as_they_were() -> None:
    output = Output(
        id="r",
        tokens=[1],
        logprobs=[TokenLogprobs(1, -0.5, 2, [(3, -0.1), (1, -0.5)])],
        prompt_logprobs=[None, TokenLogprobs(2, -1.0, 1, [])],
        finish_reason=FinishReason.STOP,
    )
    framing = messages.Framing(messages.Event)
    assert framing.feed(messages.frame(messages.Outputs(outputs=[output]))) == [messages.Outputs(outputs=[output])]


def test_a_stream_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="a message of"):
        messages.Framing(messages.Command).feed(b"GET / HTTP/1.1\r\n")
