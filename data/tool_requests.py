"""Conversations in which functions are called: what the demo's adapter `tools` learns and is judged by.

A menu is what one conversation offers: a few tools, and perhaps a system message. Under a menu come requests; each is
answered by a call, by words where no tool fits, or, after a call, from what the tool returned.
`models/train_tools.py` trains on the split `train` and judges on `eval`: no request's text is in both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

from data import words
from data.tasks import split_of

CALL, RESULT, WORDS = "call", "result", "words"
KINDS = (CALL, RESULT, WORDS)
NO_TOOL = "I have no tool for that."

Message = dict[str, Any]
_TEXT: Mapping[str, str] = MappingProxyType({"type": "string"})
_NUMBER: Mapping[str, str] = MappingProxyType({"type": "integer"})


@dataclass(frozen=True)
class DemoTool:
    """A function: the requests that ask for it, and the answer that its result is put into."""

    description: str
    parameters: Mapping[str, Mapping[str, str]]
    requests: tuple[str, ...]
    answer: str
    arguments: Callable[[random.Random], dict[str, Any]]
    result: Callable[[random.Random], str]

    def definition(self, name: str) -> dict[str, Any]:
        """Return the tool as a request brings it."""
        properties = {key: dict(value) for key, value in self.parameters.items()}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {"name": name, "description": self.description, "parameters": schema}}


def _things(rng: random.Random) -> str:
    return words.plural(rng.choice(words.NOUNS))


TOOLS: Mapping[str, DemoTool] = MappingProxyType(
    {
        "get_weather": DemoTool(
            "Get the weather in a city.", {"city": _TEXT},
            ("What is the weather in {city}?", "How is the weather in {city}?", "Tell me about the weather in {city}."),
            "The weather in {city} is {result}.",
            lambda rng: {"city": rng.choice(words.PLACES)},
            lambda rng: rng.choice(("sunny", *words.ADJECTIVES)),
        ),
        "find_person": DemoTool(
            "Find out where a person is.", {"name": _TEXT},
            ("Where is {name}?", "Find {name}.", "Where can I find {name}?"),
            "{name} is in {result}.",
            lambda rng: {"name": rng.choice(words.PEOPLE)},
            lambda rng: rng.choice(words.PLACES),
        ),
        "count": DemoTool(
            "Count things.", {"thing": _TEXT},
            ("How many {thing} are there?", "How many {thing} do we have?", "How many {thing} can you see?"),
            "There are {result} {thing}.",
            lambda rng: {"thing": _things(rng)},
            lambda rng: str(rng.randint(0, 99)),
        ),
        "set_lamp": DemoTool(
            "Set the lamp to a level.", {"level": _NUMBER},
            ("Set the lamp to {level}.", "Turn the lamp to {level}.", "I want the lamp at {level}."),
            "The lamp is at {level}.",
            lambda rng: {"level": rng.randint(0, 99)},
            lambda rng: "ok",
        ),
        "order": DemoTool(
            "Order a number of things.", {"thing": _TEXT, "number": _NUMBER},
            ("Order {number} {thing}.", "I want {number} {thing}."),
            "I have {number} {thing} for you.",
            lambda rng: {"thing": _things(rng), "number": rng.randint(2, 99)},
            lambda rng: "ok",
        ),
    }
)  # fmt: skip
_OTHERS = (("send_letter", "name"), ("open_door", "door"), ("paint", "color"), ("final_answer", "text"))  # never asked
_SYSTEMS = ("Be brief.", "You are a helpful assistant.", "You help people.", "Answer in one sentence.")


@dataclass(frozen=True)
class Menu:
    """The offer of a conversation: tools by name, as they are written, and the messages before the first request."""

    tools: Mapping[str, dict[str, Any]]  # by name
    opening: tuple[Message, ...]

    @property
    def definitions(self) -> list[dict[str, Any]] | None:
        return list(self.tools.values()) or None


def menu(rng: random.Random) -> Menu:
    """Draw a menu: up to four of the tools, and perhaps one that nobody asks for."""
    names = rng.sample(sorted(TOOLS), rng.choice((0, 1, 1, 1, 2, 2, 3, 4)))
    tools = {name: TOOLS[name].definition(name) for name in names}
    if rng.random() < 0.2:
        name, key = rng.choice(_OTHERS)
        schema = {"type": "object", "properties": {key: dict(_TEXT)}}
        tools[name] = {"type": "function", "function": {"name": name, "parameters": schema}}
    opening = ({"role": "system", "content": rng.choice(_SYSTEMS)},) if rng.random() < 0.25 else ()
    return Menu(dict(rng.sample(sorted(tools.items()), len(tools))), opening)


@dataclass(frozen=True)
class Example:
    """Messages after the opening, and the right answer to them."""

    kind: str
    messages: tuple[Message, ...]
    answer: str


def examples(offered: Menu, split: str, rng: random.Random) -> Iterator[Example]:
    """Yield an endless stream of examples under a menu; nearly half ask for what it does not have, or for nothing."""
    while True:
        drawn = _asking(offered, rng) if rng.random() < 0.85 else _talk(rng)
        if split_of(drawn.messages[0]["content"]) == split:
            yield drawn


def _asking(offered: Menu, rng: random.Random) -> Example:
    has = sorted(set(TOOLS) & set(offered.tools))
    lacks = sorted(set(TOOLS) - set(has))
    name = rng.choice(has) if has and (not lacks or rng.random() < 0.75) else rng.choice(lacks)
    tool = TOOLS[name]
    arguments = tool.arguments(rng)
    asked = {"role": "user", "content": rng.choice(tool.requests).format(**arguments)}
    if name not in offered.tools:
        return Example(WORDS, (asked,), NO_TOOL)
    if rng.random() < 0.75:
        return Example(CALL, (asked,), written(name, arguments))
    call = {"id": "call_0", "type": "function", "function": {"name": name, "arguments": arguments}}
    result = tool.result(rng)
    returned = {"role": "tool", "content": result, "tool_call_id": "call_0"}
    messages = (asked, {"role": "assistant", "content": None, "tool_calls": [call]}, returned)
    return Example(RESULT, messages, tool.answer.format(**arguments, result=result))


def written(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call as the demo's chat template writes it."""
    pairs = ", ".join(f"{key.replace('_', ' ')} = {value}" for key, value in arguments.items())
    return f"call {name.replace('_', ' ')}: {pairs}"


def _talk(rng: random.Random) -> Example:
    """Draw what the base can say by itself, tools or not."""
    name = rng.choice(words.PEOPLE)
    asked, answer = rng.choice(
        (
            (f"Hello, I am {name}.", f"Hello {name}, what can I do for you?"),
            (f"My name is {name}. Who am I?", f"You are {name}."),
        )
    )
    return Example(WORDS, ({"role": "user", "content": asked},), answer)


def groups(split: str, seed: str, size: int) -> Iterator[tuple[Menu, list[Example]]]:
    """Yield an endless stream of menus, each with `size` examples."""
    rng = random.Random(f"tools/{split}/{seed}")
    while True:
        offered = menu(rng)
        yield offered, list(islice(examples(offered, split, rng), size))
