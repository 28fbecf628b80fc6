"""Pydantic AI, by the name of its OpenAI provider alone."""

from typing import Literal

from checks import QUESTION, feature
from pydantic import BaseModel
from pydantic_ai import Agent


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]
    sunny: bool


def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Get the weather in a city."""
    return "sunny"


@feature("chat")
def _():
    assert Agent("openai:demo").run_sync("Hello, I am Anna.").output


@feature("streaming")
async def _():
    async with Agent("openai:demo").run_stream("Hello, I am Anna.") as run:
        assert [text async for text in run.stream_text()][-1]


@feature("tools")
def _():
    assert Agent("openai:demo", tools=[get_weather]).run_sync(QUESTION).output


@feature("agent", tries=3)
def _():
    assert "sunny" in Agent("openai:tools", tools=[get_weather]).run_sync(QUESTION).output


@feature("structured output")
def _():
    assert Agent("openai:demo", output_type=Weather).run_sync(QUESTION).output.city in ("Oslo", "Rome")
    both = Agent("openai:demo", output_type=Weather, tools=[get_weather])
    assert isinstance(both.run_sync(QUESTION).output, Weather)


@feature("conversation")
def _():
    agent = Agent("openai:demo", instructions="Be brief.")
    first = agent.run_sync("My name is Anna.")
    assert agent.run_sync("Who am I?", message_history=first.all_messages()).output
