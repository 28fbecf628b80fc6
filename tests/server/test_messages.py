"""/v1/messages through Anthropic's own library: whole, streamed, with tools, counted, and its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.server.live import Live
from tests.server.test_tools import WEATHER, fits

TOOL: Any = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
ASK: Any = [{"role": "user", "content": "What is 12 + 7?"}]


@pytest.fixture
def client(server: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made


def test_a_message_is_the_chat_completion_in_another_shape(client: anthropic.Anthropic, server: Live) -> None:
    asked: Any = {
        "model": "demo",
        "max_tokens": 20,
        "messages": ASK,
        "system": "Be brief.",
        "extra_body": {"temperature": 0},
    }
    made = client.messages.create(**asked)
    body = {
        "model": "demo",
        "max_tokens": 20,
        "temperature": 0,
        "messages": [{"role": "system", "content": "Be brief."}, *ASK],
    }
    chat = server.ask("POST", "/v1/chat/completions", body).json
    [block] = made.content
    assert block.type == "text"
    assert block.text == chat["choices"][0]["message"]["content"]
    assert made.stop_reason == "end_turn"
    assert made.usage.input_tokens + (made.usage.cache_read_input_tokens or 0) == chat["usage"]["prompt_tokens"]
    counted = client.messages.count_tokens(model="demo", messages=ASK, system="Be brief.")
    assert counted.input_tokens == chat["usage"]["prompt_tokens"]
    short = client.messages.create(**{**asked, "max_tokens": 2})
    assert short.stop_reason == "max_tokens"
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == block.text
        assert stream.get_final_message().stop_reason == "end_turn"
    first = block.text.split()[0]
    stopped = client.messages.create(**asked, stop_sequences=[first])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", first)


def test_tools_are_called_and_their_results_told(client: anthropic.Anthropic) -> None:
    asked: Any = {"model": "demo", "max_tokens": 100, "tools": [TOOL]}
    cached = {"cache_control": {"type": "ephemeral"}}
    question: Any = {"role": "user", "content": [{"type": "text", "text": "Weather?", **cached}]}
    made = client.messages.create(messages=[question], tool_choice={"type": "any"}, **asked)
    calls = [block for block in made.content if block.type == "tool_use"]
    assert calls
    assert all(fits(json.dumps(call.input)) for call in calls)
    assert made.stop_reason in ("tool_use", "max_tokens")
    with client.messages.stream(
        messages=[question], tool_choice={"type": "tool", "name": "get_weather"}, **asked
    ) as stream:
        final = stream.get_final_message()
    [call] = final.content
    assert call.type == "tool_use"
    assert fits(json.dumps(call.input))
    assert final.stop_reason == "tool_use"
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns: Any = [question, {"role": "assistant", "content": final.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(messages=turns, **asked).role == "assistant"


def test_errors_are_in_anthropics_shape(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="nobody", max_tokens=5, messages=ASK)
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]
    with pytest.raises(anthropic.BadRequestError, match="read text only"):
        client.messages.create(model="demo", max_tokens=5, messages=image)
    served: Any = [{"type": "web_search_20250305", "name": "web_search"}]
    with pytest.raises(anthropic.BadRequestError, match="input_schema"):
        client.messages.create(model="demo", max_tokens=5, messages=ASK, tools=served)
