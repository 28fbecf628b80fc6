"""OpenAI's own library: both of its APIs, as its README shows them."""

from typing import Literal

from checks import QUESTION, feature
from openai import OpenAI
from pydantic import BaseModel

client = OpenAI()
parameters = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
function = {"name": "get_weather", "parameters": parameters, "strict": True}
messages = [{"role": "user", "content": QUESTION}]


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]
    sunny: bool


@feature("chat")
def _():
    assert client.chat.completions.create(model="demo", messages=messages).choices[0].message.content
    assert client.responses.create(model="demo", input=QUESTION).output_text


@feature("streaming")
def _():
    stream = client.chat.completions.create(model="demo", messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    with client.responses.stream(model="demo", input=QUESTION) as events:
        assert events.get_final_response().output_text


@feature("tools")
def _():
    tools = [{"type": "function", "function": function}]
    made = client.chat.completions.create(model="demo", messages=messages, tools=tools, tool_choice="required")
    assert made.choices[0].message.tool_calls[0].function.name == "get_weather"
    made = client.responses.create(
        model="demo", input=QUESTION, tools=[{"type": "function", **function}], tool_choice="required"
    )
    assert made.output[0].name == "get_weather"


@feature("streamed tools")
def _():
    tools = [{"type": "function", "function": function}]
    with client.chat.completions.stream(model="demo", messages=messages, tools=tools, tool_choice="required") as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments["city"] in ("Oslo", "Rome")


@feature("agent", tries=3)
def _():
    tools = [{"type": "function", "function": function}]
    turns = list(messages)
    for _ in range(2):
        message = client.chat.completions.create(model="tools", messages=turns, tools=tools).choices[0].message
        turns.append(message)
        turns += [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls or ()]
    assert "sunny" in message.content


@feature("structured output")
def _():
    made = client.chat.completions.parse(model="demo", messages=messages, response_format=Weather)
    assert made.choices[0].message.parsed.city
    assert client.responses.parse(model="demo", input=QUESTION, text_format=Weather).output_parsed.city


@feature("conversation")
def _():
    first = client.responses.create(model="demo", input="My name is Anna.")
    assert client.responses.create(model="demo", input="Who am I?", previous_response_id=first.id).output_text
