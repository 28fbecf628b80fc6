"""Anthropic's own library."""

from anthropic import Anthropic
from checks import QUESTION, feature

client = Anthropic()
messages = [{"role": "user", "content": QUESTION}]
schema = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
tool = {"name": "get_weather", "input_schema": schema}


@feature("chat")
def _():
    assert client.messages.create(model="demo", max_tokens=64, messages=messages).content[0].text
    assert client.messages.count_tokens(model="demo", messages=messages).input_tokens > 5


@feature("streaming")
def _():
    with client.messages.stream(model="demo", max_tokens=64, messages=messages) as stream:
        assert "".join(stream.text_stream)


@feature("tools")
def _():
    made = client.messages.create(
        model="demo", max_tokens=300, messages=messages, tools=[tool], tool_choice={"type": "any"}
    )
    assert made.content[0].input["city"] in ("Oslo", "Rome")


@feature("streamed tools")
def _():
    choice = {"type": "tool", "name": "get_weather"}
    with client.messages.stream(
        model="demo", max_tokens=64, messages=messages, tools=[tool], tool_choice=choice
    ) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"


@feature("agent", tries=3)
def _():
    turns = list(messages)
    for _ in range(2):
        made = client.messages.create(model="tools", max_tokens=64, messages=turns, tools=[tool])
        calls = [block for block in made.content if block.type == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"} for call in calls]
        turns += [{"role": "assistant", "content": made.content}, {"role": "user", "content": results}]
    assert "sunny" in made.content[0].text


@feature("structured output")
def _():
    form = {"type": "json_schema", "schema": schema}
    made = client.messages.create(model="demo", max_tokens=64, messages=messages, output_config={"format": form})
    assert "city" in made.content[0].text


@feature("conversation")
def _():
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}}
    turns = [
        *messages,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}]},
    ]
    assert client.messages.create(model="demo", max_tokens=64, messages=turns, tools=[tool]).content
