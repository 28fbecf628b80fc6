"""/v1/responses through OpenAI's own library: whole, streamed, parsed, with functions, and continued."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.server.live import Live
from tests.server.test_tools import WEATHER, fits

FUNCTION: Any = {"type": "function", **WEATHER["function"]}
SUM = "What is 12 + 7?"


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_response_is_the_chat_completion_in_another_shape(client: openai.OpenAI) -> None:
    made = client.responses.create(model="demo", input=SUM, temperature=0, instructions="Be brief.")
    chat = client.chat.completions.create(
        model="demo",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": SUM}],
        temperature=0,
    )
    assert made.output_text == chat.choices[0].message.content
    assert made.status == "completed"
    assert made.usage
    assert chat.usage
    assert (made.usage.input_tokens, made.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    short = client.responses.create(model="demo", input=SUM, temperature=0, max_output_tokens=2)
    assert short.status == "incomplete"
    assert short.incomplete_details
    assert short.incomplete_details.reason == "max_output_tokens"


def test_a_stream_has_openais_events(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="demo", input=SUM, temperature=0)
    events = list(client.responses.create(model="demo", input=SUM, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    with client.responses.stream(model="demo", input=SUM, temperature=0) as stream:
        assert stream.get_final_response().output_text == text


def test_functions_are_called_and_their_results_told(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "demo",
        "tools": [FUNCTION],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "seed": 5,
    }
    seed = {"seed": asked.pop("seed")}
    made = client.responses.create(input="Weather?", **asked, extra_body=seed)
    [call] = made.output
    assert call.type == "function_call"
    assert fits(call.arguments)
    assert call.call_id != call.id
    events = list(client.responses.create(input="Weather?", **asked, stream=True, extra_body=seed))
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert done.arguments == call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    told: Any = [{"role": "user", "content": "Weather?"}, call.to_dict(), result]
    by_items = client.responses.create(model="demo", input=told, temperature=0, tools=[FUNCTION])
    by_name = client.responses.create(
        model="demo", input=[result], previous_response_id=made.id, temperature=0, tools=[FUNCTION]
    )
    reference: Any = {"type": "item_reference", "id": call.id}
    by_reference = client.responses.create(
        model="demo", input=[told[0], reference, result], temperature=0, tools=[FUNCTION]
    )
    assert by_items.usage
    for other in (by_name, by_reference):
        assert other.output_text == by_items.output_text
        assert other.usage
        assert other.usage.input_tokens == by_items.usage.input_tokens


def test_an_answer_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    class Sum(BaseModel):
        exact: bool
        digits: int

    made = client.responses.parse(model="demo", input=SUM, text_format=Sum, max_output_tokens=60, temperature=0)
    assert made.output_parsed is None or isinstance(made.output_parsed.exact, bool)
    assert json.loads(made.output_text) if made.status == "completed" else True


def test_stored_responses_can_be_read_and_deleted(client: openai.OpenAI) -> None:
    made = client.responses.create(model="demo", input=SUM, max_output_tokens=4)
    assert client.responses.retrieve(made.id).output_text == made.output_text
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError, match="is not stored here"):
        client.responses.retrieve(made.id)
    unstored = client.responses.create(model="demo", input=SUM, max_output_tokens=4, store=False)
    with pytest.raises(openai.NotFoundError, match="send the whole conversation"):
        client.responses.create(model="demo", input="And?", previous_response_id=unstored.id)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "read text only"),
        ({"tools": [{"type": "web_search"}]}, "only functions"),
        ({"input": []}, "input is empty"),
        ({"input": [{"type": "function_call", "name": "a"}]}, "has no"),
        ({"background": True}, "background"),
        ({"temperature": 1000}, "temperature"),
    ],
)
def test_what_is_not_served_is_refused_with_a_hint(client: openai.OpenAI, change: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.responses.create(**{"model": "demo", "input": SUM, **change})
