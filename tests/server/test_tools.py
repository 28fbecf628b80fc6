"""Tools over HTTP, on the demo: forced calls fit their schemas, whole and streamed; what is not a call stays text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.live import DEMO, Live

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
POINT = {"$ref": "#/$defs/Point"}
DRAW: Any = {
    "type": "function",
    "function": {
        "name": "draw",
        "parameters": {
            "type": "object",
            "properties": {"at": POINT},
            "required": ["at"],
            "additionalProperties": False,
            "$defs": {"Point": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}},
        },
    },
}
ASK: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def fits(arguments: str) -> bool:
    values = json.loads(arguments)
    return set(values) == {"city", "days"} and values["city"] in ("Oslo", "Rome") and values["days"] <= 9


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "get_weather"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "get_weather"}}],
            },
        },
    ],
)
def test_a_forced_call_fits_its_schema(client: openai.OpenAI, choice: Any) -> None:
    tools = [WEATHER] if choice == "required" else [WEATHER, DRAW]
    asked: Any = {
        "model": "demo",
        "messages": ASK,
        "tools": tools,
        "tool_choice": choice,
        "temperature": 1.0,
        "seed": 3,
    }
    made = client.chat.completions.create(**asked)
    [call] = made.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert fits(call.function.arguments)
    assert call.id.startswith("call_")
    assert made.choices[0].finish_reason == "tool_calls"
    assert made.choices[0].message.content is None
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or []]
    assert len(deltas) > 2
    assert deltas[0].id
    assert deltas[0].function
    assert deltas[0].function.name == "get_weather"
    streamed = "".join(delta.function.arguments or "" for delta in deltas if delta.function)
    assert streamed == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_references_inside_a_tools_schema_are_its_own(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="demo",
        messages=ASK,
        tools=[WEATHER, DRAW],
        tool_choice={"type": "function", "function": {"name": "draw"}},
        max_tokens=200,
    )
    [call] = made.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments)["at"]["x"] in (1, 2)


def test_several_calls_have_numbers_and_ids_of_their_own(client: openai.OpenAI) -> None:
    vocabulary: dict[str, int] = json.loads((DEMO / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    closing: Any = {str(token): -100 for text, token in vocabulary.items() if "]" in text}
    for bias, wanted in (({}, 1), (closing, 8)):  # a list that would rather not end has as many as are ever allowed
        made = client.chat.completions.create(
            model="demo",
            messages=ASK,
            tools=[WEATHER],
            tool_choice="required",
            parallel_tool_calls=True,
            temperature=0,
            logit_bias=bias,
        )
        calls = made.choices[0].message.tool_calls or []
        assert all(call.type == "function" and fits(call.function.arguments) for call in calls)
        assert len({call.id for call in calls}) == len(calls)
        assert len(calls) >= wanted
    assert len(calls) == 8


def test_without_a_call_the_answer_is_text(client: openai.OpenAI) -> None:
    repeat: Any = [{"role": "user", "content": "Repeat: the old fox found a boat in Oslo."}]
    asked: Any = {"model": "demo", "messages": repeat, "max_tokens": 30, "temperature": 0}
    plain = client.chat.completions.create(**asked)
    for choice in ("none", "auto"):
        made = client.chat.completions.create(**asked, tools=[WEATHER], tool_choice=choice)
        assert made.choices[0].message.tool_calls is None
        assert made.choices[0].message.content
        assert made.choices[0].finish_reason in ("stop", "length")
    none = client.chat.completions.create(**asked, tools=[WEATHER], tool_choice="none")
    assert none.choices[0].message == plain.choices[0].message


def test_a_call_that_the_model_writes_by_itself_is_told_apart(client: openai.OpenAI) -> None:
    """A choice of one text stands for what a trained adapter would write."""
    call = "call get weather: city = Oslo, days = 1"
    tool: Any = {"model": "demo", "messages": ASK, "tools": [WEATHER]}
    for text in (call, f"I look.\n{call}"):
        written = {"guided_choice": [text]}
        made = client.chat.completions.create(**tool, extra_body=written).choices[0]
        [called] = made.message.tool_calls or []
        assert called.type == "function"
        assert fits(called.function.arguments)
        assert made.finish_reason == "tool_calls"
        assert (made.message.content or "") == text.removesuffix(call)
        chunks = list(client.chat.completions.create(**tool, extra_body=written, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text.removesuffix(call)
        deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or []]
        arguments = "".join(delta.function.arguments or "" for delta in deltas if delta.function)
        assert arguments == called.function.arguments
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
    unknown = call.replace("get weather", "get news")
    made = client.chat.completions.create(**tool, extra_body={"guided_choice": [unknown]}).choices[0]
    assert made.message.content == unknown
    assert made.finish_reason == "stop"


def test_a_schema_for_the_answer_beside_tools_leaves_both_open(client: openai.OpenAI) -> None:
    shape: Any = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    made = client.chat.completions.create(
        model="demo",
        messages=ASK,
        tools=[WEATHER],
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": shape}},
        max_tokens=200,
    )
    message = made.choices[0].message
    if message.tool_calls:
        assert all(call.type == "function" and fits(call.function.arguments) for call in message.tool_calls)
    else:
        assert json.loads(message.content or "")["ok"] in (True, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tool_choice": "required", "tools": None}, "there are no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice names nobody"),
        ({"tool_choice": {"type": "function"}}, "needs function"),
        ({"tools": [WEATHER, WEATHER]}, "two tools have the same name"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "choose one"),
        ({"functions": [{"name": "a"}]}, "send tools"),
        ({"chat_template": "x"}, "--chat-template"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "read text only"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(server: Live, change: dict[str, Any], message: str) -> None:
    body = {"model": "demo", "messages": ASK, "tools": [WEATHER], **change}
    answer = server.ask("POST", "/v1/chat/completions", body)
    assert answer.status == 400
    assert message in answer.json["error"]["message"]


def test_answers_in_json_end(client: openai.OpenAI) -> None:
    """Greedy answers filled the context with white space."""
    shape = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {**shape, "additionalProperties": False}},
    }
    asked: Any = {"model": "demo", "messages": ASK, "temperature": 0, "response_format": form}
    assert json.loads(client.chat.completions.create(**asked).choices[0].message.content or "")["ok"] in (True, False)
    for how in (
        {"structured_outputs": {"disable_any_whitespace": True}},
        {"guided_whitespace_pattern": ""},
        {"structured_outputs": {"whitespace_pattern": "\t"}},
    ):
        text = client.chat.completions.create(**asked, extra_body=how).choices[0].message.content or ""
        assert (" " in text) is False
        assert json.loads(text)
