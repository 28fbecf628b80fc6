"""Framing: whatever the pieces, the messages come out whole and in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.config import AdapterConfig, EngineConfig
from inlaid.engine.refusal import Refusal, RefusalKind
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


@pytest.mark.parametrize("half", [chr(0xD800), f"a{chr(0xDFFF)}b", chr(0xDCFF)])
def test_half_a_character_crosses_as_its_escape(half: str) -> None:
    """Also in the keys of a dict, and whatever holds it."""
    shown = half.encode("utf-8", "backslashreplace").decode()
    failure = messages.Failure(call=1, refusal=Refusal(half, RefusalKind.FAULT, param=half))
    [event] = messages.Framing(messages.Event).feed(messages.frame(failure))
    assert event == messages.Failure(call=1, refusal=Refusal(shown, RefusalKind.FAULT, param=shown))
    call = messages.Call(call=1, name="set_scheduler", arguments={half: [half, {"a": half}], "n": 3})
    [command] = messages.Framing(messages.Command).feed(messages.frame(call))
    assert command.arguments == {shown: [shown, {"a": shown}], "n": 3}


def test_a_message_that_cannot_be_sent_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (2**64, object()):
        with pytest.raises(messages.Unsendable, match="cannot be sent"):
            messages.frame(messages.Reply(call=1, value=value))
    monkeypatch.setattr(messages, "MAX_MESSAGE", 1000)
    with pytest.raises(messages.Unsendable, match="at most 1000"):
        messages.frame(messages.Reply(call=1, value="x" * 1000))


def test_a_stream_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="a message of"):
        messages.Framing(messages.Command).feed(b"GET / HTTP/1.1\r\n")
