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


@feature("structured output")
def _():
    assert client.create(messages=messages, response_model=Weather).city in ("Oslo", "Rome")


@feature("streaming")
def _():
    parts = list(client.create_partial(messages=messages, response_model=Weather))
    assert parts[-1].city in ("Oslo", "Rome")


@feature("streamed tools")
def _():
    for made in client.create_iterable(messages=messages, response_model=Weather, temperature=0):
        assert made.city in ("Oslo", "Rome")
        break
