"""Instructor, in its default mode."""

from typing import Literal

import instructor
from checks import QUESTION, feature
from pydantic import BaseModel

client = instructor.from_provider("openai/demo")
messages = [{"role": "user", "content": QUESTION}]


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]
    sunny: bool


class Place(BaseModel):
    city: str
    sunny: bool


@feature("structured output")
def _():
    assert client.create(messages=messages, response_model=Weather).city in ("Oslo", "Rome")


@feature("streaming")
def _():
    parts = list(client.create_partial(messages=messages, response_model=Weather))
    assert parts[-1].city in ("Oslo", "Rome")


@feature("streamed tools")
def _():
    made = list(client.create_iterable(messages=messages, response_model=Weather))
    assert made
    assert all(one.city in ("Oslo", "Rome") for one in made)


@feature("agent", tries=3)
def _():
    """Have the adapter fill in a text that no list holds."""
    caller = instructor.from_provider("openai/tools")
    assert caller.create(messages=messages, response_model=Place).city == "Oslo"
    assert [one.city for one in caller.create_iterable(messages=messages, response_model=Place)] == ["Oslo"]
