"""The demo's adapter `tools`, which decides by itself: asked with `auto`, it calls, is told the result, and answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from data.tool_requests import NO_TOOL, TOOLS
from tests.server.live import Live

MENU: Any = [TOOLS[name].definition(name) for name in ("set_lamp", "get_weather", "count")]
ASKED = [
    ("What is the weather in Rome?", "get_weather", {"city": "Rome"}, "sunny", "The weather in Rome is sunny."),
    ("How many boys are there?", "count", {"thing": "boys"}, "12", "There are 12 boys."),
    ("Set the lamp to 5.", "set_lamp", {"level": 5}, "ok", "The lamp is at 5."),
]


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, messages: list[Any], **more: Any) -> Any:
    asked: Any = {"model": "tools", "messages": messages, "tools": MENU, "tool_choice": "auto", "temperature": 0}
    return client.chat.completions.create(**asked | more)


@pytest.mark.parametrize(("request_text", "name", "arguments", "result", "answer"), ASKED)
def test_it_calls_is_told_the_result_and_answers(
    client: openai.OpenAI, request_text: str, name: str, arguments: dict[str, Any], result: str, answer: str
) -> None:
    messages: list[Any] = [{"role": "user", "content": request_text}]
    choice = chat(client, messages).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (name, arguments)
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    told = chat(client, messages).choices[0]
    assert (told.finish_reason, told.message.tool_calls, told.message.content) == ("stop", None, answer)


def test_it_calls_and_answers_when_streamed(client: openai.OpenAI) -> None:
    request_text, name, arguments, result, answer = ASKED[0]
    messages: list[Any] = [{"role": "user", "content": request_text}]
    asked: Any = {"model": "tools", "tools": MENU, "temperature": 0}
    with client.chat.completions.stream(messages=messages, **asked) as stream:
        events: list[Any] = list(stream)
        choice = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.done" in {event.type for event in events}
    assert "".join(event.delta for event in events if event.type == "content.delta") == ""
    [call] = choice.message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == (name, arguments)
    messages += [choice.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": result}]
    chunks = list(chat(client, messages, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(("request_text", "name", "arguments", "result", "answer"), ASKED)
def test_a_demanded_call_has_any_text_and_ends(
    client: openai.OpenAI, request_text: str, name: str, arguments: dict[str, Any], result: str, answer: str
) -> None:
    """The model's vocabulary knows no quote that could end a text of JSON."""
    messages: list[Any] = [{"role": "user", "content": request_text}]
    choice = chat(client, messages, tool_choice="required").choices[0]
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == (name, arguments)


def test_it_answers_in_words_where_no_tool_fits(client: openai.OpenAI) -> None:
    for text, answer in (("Where is Anna?", NO_TOOL), ("Hello, I am Anna.", "Hello Anna, what can I do for you?")):
        choice = chat(client, [{"role": "user", "content": text}]).choices[0]
        assert (choice.finish_reason, choice.message.tool_calls, choice.message.content) == ("stop", None, answer)


def test_responses_carry_its_calls(client: openai.OpenAI) -> None:
    request_text, name, arguments, result, answer = ASKED[0]
    asked: Any = {"model": "tools", "temperature": 0, "tools": [{"type": "function", **t["function"]} for t in MENU]}
    [call] = (first := client.responses.create(input=request_text, **asked)).output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", name, arguments)
    returned = {"type": "function_call_output", "call_id": call.call_id, "output": result}
    assert client.responses.create(input=[returned], previous_response_id=first.id, **asked).output_text == answer


def test_messages_carry_its_calls(server: Live) -> None:
    request_text, name, arguments, result, answer = ASKED[0]
    functions = [tool["function"] for tool in MENU]
    tools = [{"name": one["name"], "input_schema": one["parameters"]} for one in functions]
    asked: Any = {"model": "tools", "extra_body": {"temperature": 0}, "max_tokens": 64, "tools": tools}
    messages: list[Any] = [{"role": "user", "content": request_text}]
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        made = client.messages.create(messages=messages, **asked)
        [call] = made.content
        assert (made.stop_reason, call.type, call.name, call.input) == ("tool_use", "tool_use", name, arguments)
        returned = {"type": "tool_result", "tool_use_id": call.id, "content": result}
        messages += [{"role": "assistant", "content": made.content}, {"role": "user", "content": [returned]}]
        [said] = client.messages.create(messages=messages, **asked).content
    assert said.text == answer
