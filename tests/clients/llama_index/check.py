"""LlamaIndex, with the class that it has for other servers of OpenAI's API."""

from typing import Literal

from checks import QUESTION, URL, feature
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


def served(name):
    return OpenAILike(
        model=name, api_base=f"{URL}/v1", api_key="none", is_chat_model=True, is_function_calling_model=True,
        context_window=2048,
    )  # fmt: skip


llm = served("demo")


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Oslo", "Rome"]
    sunny: bool


def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Get the weather in a city."""
    return "sunny"


@feature("chat")
def _():
    assert llm.chat([ChatMessage(role="user", content="Hello, I am Anna.")]).message.content
    assert llm.complete("Hello").text


@feature("streaming")
def _():
    assert list(llm.stream_chat([ChatMessage(role="user", content="Hello, I am Anna.")]))[-1].message.content


@feature("tools")
async def _():
    assert str(await FunctionAgent(tools=[get_weather], llm=llm).run(QUESTION))


@feature("agent", tries=3)
async def _():
    assert "sunny" in str(await FunctionAgent(tools=[get_weather], llm=served("tools")).run(QUESTION))


@feature("structured output")
def _():
    assert llm.structured_predict(Weather, PromptTemplate(QUESTION)).city in ("Oslo", "Rome")
