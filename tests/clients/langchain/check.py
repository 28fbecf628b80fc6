"""LangChain's ChatOpenAI and its agents."""

from typing import Literal

from checks import QUESTION, feature
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

llm = ChatOpenAI(model="demo")


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Oslo", "Rome"]
    sunny: bool


@tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Get the weather in a city."""
    return "sunny"


@feature("chat")
def _():
    assert llm.invoke("Hello, I am Anna.").content


@feature("streaming")
def _():
    assert "".join(chunk.content for chunk in llm.stream("Hello, I am Anna."))


@feature("tools")
def _():
    made = llm.bind_tools([get_weather], tool_choice="any").invoke(QUESTION)
    assert made.tool_calls[0]["args"]["city"] in ("Oslo", "Rome")
    agent = create_agent(llm, [get_weather])
    assert agent.invoke({"messages": [("user", QUESTION)]})["messages"][-1].content


@feature("streamed tools")
def _():
    total = None
    for chunk in llm.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False).stream(QUESTION):
        total = chunk if total is None else total + chunk
    assert total.tool_calls[0]["name"] == "get_weather"


@feature("agent", tries=3)
def _():
    caller = ChatOpenAI(model="tools")
    agent = create_agent(caller, [get_weather])
    assert "sunny" in agent.invoke({"messages": [("user", QUESTION)]})["messages"][-1].content
    both = create_agent(caller, [get_weather], response_format=Weather)
    done = both.invoke({"messages": [("user", QUESTION)]})
    assert done["structured_response"].city == "Oslo"
    assert "tool" in [message.type for message in done["messages"][:-2]]


@feature("structured output")
def _():
    assert llm.with_structured_output(Weather).invoke(QUESTION).city in ("Oslo", "Rome")
    by_call = llm.with_structured_output(Weather, method="function_calling")
    assert by_call.invoke(QUESTION).city in ("Oslo", "Rome")
    agent = create_agent(llm, [], response_format=Weather)
    assert agent.invoke({"messages": [("user", QUESTION)]})["structured_response"].city in ("Oslo", "Rome")
