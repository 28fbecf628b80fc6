"""OpenAI's agents, which speak its Responses API."""

from typing import Literal

from agents import Agent, ModelSettings, Runner, SQLiteSession, function_tool
from checks import QUESTION, feature
from pydantic import BaseModel


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]
    sunny: bool


@function_tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Get the weather in a city."""
    return "sunny"


plain = Agent(name="Plain", instructions="Be brief.", model="demo")


@feature("chat")
def _():
    assert Runner.run_sync(plain, "Hello, I am Anna.").final_output


@feature("streaming")
async def _():
    run = Runner.run_streamed(plain, "Hello, I am Anna.")
    kinds = [event.type async for event in run.stream_events()]
    assert "raw_response_event" in kinds
    assert run.final_output


@feature("tools")
def _():
    agent = Agent(name="Caller", model="demo", tools=[get_weather])
    assert Runner.run_sync(agent, QUESTION).final_output
    forced = Agent(
        name="Forced", model="demo", tools=[get_weather], model_settings=ModelSettings(tool_choice="required")
    )
    assert any(item.type == "tool_call_item" for item in Runner.run_sync(forced, QUESTION).new_items)


@feature("streamed tools")
async def _():
    forced = Agent(
        name="Forced", model="demo", tools=[get_weather], model_settings=ModelSettings(tool_choice="required")
    )
    run = Runner.run_streamed(forced, QUESTION)
    items = [event.item.type async for event in run.stream_events() if event.type == "run_item_stream_event"]
    assert "tool_call_item" in items


@feature("agent", tries=3)
def _():
    agent = Agent(name="Caller", model="tools", tools=[get_weather])
    assert "sunny" in Runner.run_sync(agent, QUESTION).final_output


@feature("structured output")
def _():
    agent = Agent(name="Typed", model="demo", output_type=Weather)
    assert Runner.run_sync(agent, QUESTION).final_output.city in ("Oslo", "Rome")


@feature("conversation")
def _():
    session = SQLiteSession("anna")
    Runner.run_sync(plain, "My name is Anna.", session=session)
    assert Runner.run_sync(plain, "Who am I?", session=session).final_output
