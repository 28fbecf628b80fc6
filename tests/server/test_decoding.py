"""Bodies with more than the known fields: those are left out and named, near misses and numbers aside."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from inlaid.server.decoding import BodyDecoder, warning
from inlaid.server.errors import BadRequest, undecodable
from inlaid.server.protocol.chat import ChatBody
from inlaid.server.protocol.responses import ResponseBody

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def decode(strict: bool = False, **change: Any) -> tuple[Any, list[str]]:
    return BodyDecoder(ChatBody, strict).decode(msgspec.json.encode({**BODY, **change}))


def test_unknown_fields_are_left_out_and_named_at_every_depth() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a", "colour": 1}], "mood": "sad"}] * 2
    body, ignored = decode(
        messages=messages,
        verbosity="low",
        greenness=5,
        response_format={"type": "text", "zebra": 1},
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"anything": 1}, "deferred": 1}}],
        logit_bias={"5": 1},
    )
    assert ignored == [
        "messages.content.colour",
        "messages.mood",
        "greenness",
        "response_format.zebra",
        "tools.function.deferred",
    ]
    assert body.messages[0].content[0].text == "a"
    assert body.tools[0].function.parameters == {"anything": 1}
    assert body.logit_bias == {5: 1}


def test_numbers_may_be_text() -> None:
    body, ignored = decode(temperature="0.5", max_tokens="7", stream="true")
    assert (body.temperature, body.max_tokens, body.stream, ignored) == (0.5, 7, True, [])


@pytest.mark.parametrize(
    ("name", "meant"), [("max_toknes", "max_tokens"), ("tempreature", "temperature"), ("tool", "tools")]
)
def test_a_near_miss_is_an_error(name: str, meant: str) -> None:
    with pytest.raises(BadRequest, match=f"did you mean '{meant}'"):
        decode(**{name: 1})


def test_a_near_miss_deep_down_says_where() -> None:
    with pytest.raises(BadRequest, match="in messages; did you mean 'content'"):
        decode(messages=[{"role": "user", "contents": "a"}])


def test_strictly_nothing_is_left_out() -> None:
    for change in ({"greenness": 1}, {"temperature": "0.5"}):
        with pytest.raises(msgspec.ValidationError):
            decode(strict=True, **change)


def test_what_is_wrong_stays_wrong() -> None:
    with pytest.raises(msgspec.ValidationError, match="temperature"):
        decode(greenness=1, temperature="warm")
    with pytest.raises(BadRequest, match="more than 64 unknown fields"):
        decode(**{f"field_{index}_x": 1 for index in range(100)})


def test_the_header_is_one_printable_line() -> None:
    assert warning(["a", "b.c"]) == "unknown fields ignored: a, b.c"
    text = warning(['x"\r\n\u00e9' * 1000])
    assert text.isprintable()
    assert text.isascii()
    assert len(text) < 1100


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (ResponseBody, {"background": True}, "background cannot be true here; leave it out"),
        (ResponseBody, {"conversation": "c"}, "conversation is not served here; leave it out"),
        (ResponseBody, {"prompt": {"id": "p"}}, "prompt is not served here; leave it out"),
        (ChatBody, {**BODY, "detokenize": False}, "detokenize cannot be false here; leave it out"),
        (ChatBody, {**BODY, "structured_outputs": {"structural_tag": "t"}}, "structured_outputs.structural_tag is not"),
        (ChatBody, {**BODY, "max_tokens": "many"}, "Expected `int | null`, got `str`"),
    ],
)
def test_a_value_that_is_not_served_is_told_in_words(kind: type, change: dict[str, Any], said: str) -> None:
    with pytest.raises(msgspec.ValidationError) as raised:
        BodyDecoder(kind, strict=False).decode(msgspec.json.encode({"input": "x"} | change))
    error = undecodable(raised.value)
    assert error.message.startswith(said)
    assert error.param == next(name for name in change if name != "messages")
